import json
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from hybrid.analytics import results
from hybrid.errors import ConfigError

NOW = datetime(2026, 11, 29, 9, 0, tzinfo=UTC)
SPEND = {"epsilon": 0.2, "delta": 1e-5, "purpose": "analyze", "releases": 1, "run": "monday"}
PAID = {"model": "shop", "value": 1.5, "spend": SPEND}
FREE = {"model": "shop", "value": 2.5}


def test_answers_are_read_as_they_were_kept_the_oldest_first(tmp_path):
    """Of both runs, but none of another model."""
    results.keep(tmp_path / "runs" / "b", "analyze", PAID, mark="noised", now=NOW)
    results.keep(tmp_path / "runs" / "a", "inversion", FREE, mark="oracle", now=NOW + timedelta(hours=1))
    results.keep(tmp_path / "runs" / "a", "analyze", FREE | {"model": "other"}, mark="public", now=NOW)
    found = results.read(tmp_path / "runs", "shop")
    assert [(run, one.kind, one.mark, one.shown) for run, one in found] == [
        ("b", "analyze", "noised", PAID),
        ("a", "inversion", "oracle", FREE),
    ]


def test_no_answer_is_written_over(tmp_path):
    """The second of a kind has the next number, and the first is as it was."""
    first = results.keep(tmp_path, "analyze", FREE, mark="public")
    before = first.read_bytes()
    second = results.keep(tmp_path, "analyze", FREE | {"value": 3.5}, mark="public")
    assert [first.name, second.name] == ["analyze-0001.json", "analyze-0002.json"]
    assert first.read_bytes() == before


def test_an_answer_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Where the disk fails before all is on it, neither the file nor a draft is left."""

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        results.keep(tmp_path, "analyze", FREE, mark="public")
    assert list((tmp_path / results.FOLDER).iterdir()) == []


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN, and other readers refuse it."""
    file = results.keep(tmp_path, "analyze", FREE | {"value": float("nan")}, mark="public")
    assert json.loads(file.read_text())["shown"]["value"] is None


@pytest.mark.parametrize(("mark", "shown"), [("noised", FREE), ("public", PAID), ("oracle", PAID)])
def test_what_is_noised_was_paid_for_and_nothing_else_was(tmp_path, mark, shown):
    """An answer without its spend cannot be kept as noised, nor one with a spend as anything else."""
    with pytest.raises(ValidationError, match="spend must be there where numbers are noised"):
        results.keep(tmp_path, "analyze", shown, mark=mark)


@pytest.mark.parametrize("content", ["", "{", '{"kind": "analyze"}', '{"kind": "../x", "model": "shop"}'])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    """With its run."""
    folder = tmp_path / "runs" / "monday" / results.FOLDER
    folder.mkdir(parents=True)
    (folder / "analyze-0001.json").write_text(content)
    with pytest.raises(ConfigError, match=r"runs/monday/results/analyze-0001\.json must be an answer .* move it"):
        results.read(tmp_path / "runs", "shop")


def test_kept_answers_of_one_kind_are_read_once_each(tmp_path):
    """Those that come later too; what is there already is not read again, even where it was damaged since."""
    first = results.keep(tmp_path / "runs" / "b", "analyze", PAID, mark="noised", now=NOW)
    results.keep(tmp_path / "runs" / "b", "inversion", FREE, mark="oracle", now=NOW)
    kept = results.Kept(tmp_path / "runs", "shop", "analyze")
    assert [one.shown for one in kept.all()] == [PAID]
    first.write_text("{")
    results.keep(tmp_path / "runs" / "a", "analyze", FREE, mark="public", now=NOW - timedelta(hours=1))
    assert [one.shown for one in kept.all()] == [FREE, PAID]
