"""What the documents tell a reader to type is typed here."""

import json
import re
import subprocess

import pytest

from hybrid.bundle import signing_key, trusted_key
from integration_tests.documents import DOCS, ROOT, commands

CHART = ROOT / "helm" / "hybrid" / "README.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), CHART]
INSTALL, DOCTOR = DOCS / "operations" / "install.md", DOCS / "doctor.md"
ELSEWHERE = {  # by test_walkthroughs.py and test_report.py
    *("walkthrough", "operating", "fleet", "flower", "rollout", "study-coach", "analytics", "balance", "drift"),
    *("audit", "leakage", "report"),
}
RUN = {INSTALL, DOCTOR, *(DOCS / f"{name}.md" for name in ELSEWHERE)}


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if d not in RUN],
    ids=lambda d: d.name,
)
def test_documents_name_only_make_targets_that_exist(document):
    """Outside the walkthroughs a document's commands are `make TARGET`, and make knows each target."""
    for block in commands(document):
        for line in block.splitlines():
            assert line.startswith("make "), f"{document.name}: {line!r} is run by no test"
            subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_between_documents_lead_somewhere(document):
    """Each relative link of a document is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_a_new_workspace_is_brought_to_this_version_and_is_well(type_commands):
    """What is shown first is what is done; then nothing fails, nor has to be watched."""
    printed = type_commands("\n".join(commands(DOCTOR)))
    assert printed.count("│ would") == printed.count("│ done") > 5, printed
    assert re.search(r"^[1-9] ok, 0 to watch, 0 failed", printed, re.MULTILINE), printed
    (found,) = re.findall(r'^{"ok": true, "findings": (.*)}$', printed, re.MULTILINE)
    assert [(each["check"], each["status"]) for each in json.loads(found)] == [("registry", "ok")]


def test_the_keys_of_an_installation_are_made_as_it_says(type_commands, tmp_path):
    """All that the chart's Secrets hold: the bundle key is one that devices read, certificates are of the authority."""
    printed = type_commands("\n".join(commands(INSTALL)))
    made = {"ca.crt", "tls.crt", "tls.key", "runtime.crt", "runtime.key", "superlink", "superexec"}
    made |= {f"{name}-{index}" for name in ("node", "token") for index in (0, 1)} | {"node-0.pub", "node-1.pub"}
    assert made <= set(printed.split())
    keys = tmp_path / "secrets/keys"
    trusted_key(keys / "bundle-signing.pub").verify(signing_key(keys).sign(b"a bundle"), b"a bundle")
    fleet = tmp_path / "secrets/fleet"
    for name in ("tls", "runtime"):
        verified = ["openssl", "verify", "-CAfile", fleet / "ca.crt", fleet / f"{name}.crt"]
        subprocess.run(verified, check=True, capture_output=True)
    assert all(path.stat().st_mode & 0o077 == 0 for path in fleet.iterdir()), "nobody else reads them"
