"""What documents tell a reader to type, and typing it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def commands(document: Path) -> list[str]:
    """The fenced `sh` blocks of a document."""
    return re.findall(r"^```sh\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def once(*documents: Path) -> str:
    """A script of their commands, each line once: they begin alike, and what is there need not be made again."""
    lines = "\n".join(block for document in documents for block in commands(document)).splitlines()
    return "\n".join(dict.fromkeys(lines))


def clone(folder: Path) -> None:
    """Makes a folder like a fresh clone's, but for what was installed."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    for part in (".venv", ".cache"):
        (folder / part).symlink_to(ROOT / part)


def typed(folder: Path, script: str) -> str:
    """What typing it in one shell printed there."""
    environment = {name: value for name, value in os.environ.items() if name != "HYBRID_HOME"}
    words = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
