import sys
from pathlib import Path

import pytest

from hybrid.errors import StackError
from hybrid.local import kafka, triton
from hybrid.local.triton import _python


def test_a_server_that_is_not_installed_says_how_to_install_it(tmp_path: Path):
    """Both names are in the message, and the command."""
    with pytest.raises(StackError, match=r"Apache Kafka .* run `python -m hybrid\.local install`"):
        kafka.service(tmp_path, tmp_path / "data", port=1, controller_port=2)
    with pytest.raises(StackError, match=r"NVIDIA Triton .* run `python -m hybrid\.local install`"):
        triton.service(tmp_path, tmp_path, http_port=1, grpc_port=2, metrics_port=3, shared_memory="none-")


@pytest.mark.parametrize(
    ("version", "shared", "chosen"),
    [
        ((3, 12), True, ["--python", sys.executable]),
        ((3, 12), False, ["--managed-python", "--python", "3.12"]),
        ((3, 13), True, ["--managed-python", "--python", "3.12"]),
    ],
)
def test_triton_gets_a_python_that_it_can_run_on(version: tuple[int, int], shared: bool, chosen: list[str]):
    """The running one if it has a shared library and is not too new for NumPy 1.26, else one that uv brings."""
    assert _python(version, shared=shared) == chosen
