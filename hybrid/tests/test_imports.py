import subprocess
import sys

import pytest

HEAVY = {"executorch", "feast", "flwr", "kafka", "mlflow", "opacus", "pandas", "pyarrow", "torch", "tritonclient"}
DEVICE = "device_runtime, device_runtime.client, device_runtime.program, device_runtime.store"


@pytest.mark.parametrize(
    "modules", ["hybrid", "hybrid.bundle, hybrid.messages, hybrid.deployment, hybrid.protocol", DEVICE]
)
def test_import_brings_nothing_heavy(modules: str):
    """Importing the nouns or the device's modules loads none of HEAVY: a phone pays only for what it runs."""
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert HEAVY.isdisjoint(loaded)


def test_the_command_line_answers_help_without_them():
    """`hybrid --help` loads none of HEAVY either, so it is instant."""
    code = "import sys, hybrid.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert HEAVY.isdisjoint(loaded)
