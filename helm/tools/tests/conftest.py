import shutil
from pathlib import Path

import pytest

from helm.tools.check import Chart
from hybrid.local.process import default_cache

HELM = Path(__file__).resolve().parents[2]
LINT = """
[[exclude]]
check = "deployment-replicas"
object = "Deployment/hybrid"
reason = "kube-score does not know that a ScaledObject says how many there are"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chart with nothing wrong in it, with what lies beside the real one."""
    shutil.copytree(Path(__file__).with_name("chart"), tmp_path / "small")
    shutil.copytree(HELM / "crds-for-tests", tmp_path / "crds-for-tests")
    (tmp_path / "lint.toml").write_text(LINT)
    return tmp_path / "small"


@pytest.fixture
def chart(folder: Path) -> Chart:
    return Chart(folder, default_cache())


@pytest.fixture
def plant(folder: Path):
    """Replaces some text of a file of the chart, which must be there, by another."""

    def replace(file: str, text: str, other: str) -> None:
        path = folder / file
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, other))

    return replace
