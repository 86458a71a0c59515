"""What the documents tell a reader to type is typed here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid.local.process import free_ports

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
STUDY_COACH = ROOT / "docs" / "study-coach.md"


def commands(document: Path) -> list[str]:
    """The fenced `sh` blocks of a document."""
    return re.findall(r"^```sh\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d not in (WALKTHROUGH, STUDY_COACH)], ids=lambda d: d.name
)
def test_documents_name_only_make_targets_that_exist(document):
    """Outside the two walkthroughs a document's commands are `make TARGET`, and make knows each target."""
    for block in commands(document):
        for line in block.splitlines():
            assert line.startswith("make "), f"{document.name}: {line!r} is run by no test"
            subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_between_documents_lead_somewhere(document):
    """Each relative link of a document is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.fixture
def type_commands(tmp_path):
    """(script) -> what typing it in one shell printed, in a folder like a fresh clone's."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    for part in (".venv", ".cache"):
        (tmp_path / part).symlink_to(ROOT / part)
    environment = {name: value for name, value in os.environ.items() if name != "HYBRID_HOME"}

    def typed(script):
        words = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield typed
    subprocess.run([ROOT / ".venv/bin/hybrid", "down"], cwd=tmp_path, check=True, capture_output=True)


def test_the_study_coach_trains_on_a_label_that_only_devices_know(type_commands):
    """Its commands succeed; label counts and rounds cost epsilon 2 together, and the ledger says both."""
    printed = type_commands("\n".join(commands(STUDY_COACH)))
    assert "protects the device features and label" in printed
    assert "label-rates" in printed
    assert re.search(r"epsilon (1\.99\d|2\.000) at delta 2\.3e-05 per user", printed), printed


def test_the_walkthrough_does_what_it_says(type_commands):
    """Its commands, typed in order in one shell, all succeed, and every request is predicted.

    One thing differs from what a reader types: the gateway and the servers take
    free ports, since the default ones may be taken where tests run.
    """
    (gateway,) = free_ports(1)
    script = "\n".join(commands(WALKTHROUGH)).replace("hybrid up", f"hybrid up --free-ports --gateway-port {gateway}")
    printed = type_commands(script.replace("127.0.0.1:8080", f"127.0.0.1:{gateway}"))
    assert "unknown_entity" in printed, "the walkthrough says that an unknown offer says so"
    counts = re.search(r"(\d+) requests from \d+ devices, (\d+) answered, (\d+) predicted", printed)
    requests, answered, predicted = map(int, counts.groups())
    assert requests == answered == predicted > 2000
    assert "'name': 'coupon'" in printed, "a plain client reads the model's metadata"
