from pathlib import Path

import pytest

from helm.tools import install
from hybrid.errors import StackError


def test_without_go_the_message_says_what_to_do(tmp_path: Path, monkeypatch):
    """Either install it, or bring the program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install, "_GO", str(tmp_path))
    with pytest.raises(StackError, match=r"(?s)built by Go 1\.26 or later.*install it.*or put the program") as raised:
        install._build(install.HELM, tmp_path / "cache", lambda _line: None)
    assert str(tmp_path / "cache/helm-tools/helm-4.3.2/helm") in str(raised.value)


def test_a_program_that_is_there_is_not_built_again(tmp_path: Path, monkeypatch):
    """Also where there is no Go."""
    monkeypatch.setattr(install, "_GO", str(tmp_path))
    program = install.HELM.folder(tmp_path) / "helm"
    program.parent.mkdir(parents=True)
    program.touch()
    said: list[str] = []
    install._build(install.HELM, tmp_path, said.append)
    assert said == []
    assert install.HELM.program(tmp_path) == program


def test_a_program_that_is_not_there_is_an_error_that_says_what_to_run(tmp_path: Path):
    """Not one of the operating system."""
    with pytest.raises(StackError, match=r"run `python -m helm\.tools\.install cluster`"):
        install.HELM.program(tmp_path)


def test_the_replacements_of_a_module_are_said_again():
    """Those by another module as they are; those by a folder of its own as what that is published as, if it is."""
    other = {"Old": {"Path": "a.org/a", "Version": "v1"}, "New": {"Path": "b.org/a", "Version": "v2"}}
    own = {"Old": {"Path": "k8s.io/api"}, "New": {"Path": "./staging/src/k8s.io/api"}}
    assert list(install._replacements([other, own], "v0.34.2")) == [
        "replace a.org/a v1 => b.org/a v2",
        "replace k8s.io/api => k8s.io/api v0.34.2",
    ]
    assert list(install._replacements([own], None)) == []
