import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid.deployment import Canary, Halted, Shadow, Window, change, history
from hybrid.errors import ConfigError
from hybrid.features import Features, Numeric
from hybrid.spec import Serving
from serving.testing import deployment


def halted(version: int) -> Halted:
    return Halted(version=version, reason="worse", signed="")


def numbers(window: Window) -> list[int]:
    return [version.version for version in window.versions]


def test_a_canary_is_served_beside_the_window_until_it_is_the_default():
    """The default and the one before it go on being served; at its promotion the oldest leaves, as ever."""
    window = Window(versions=(deployment(2), deployment(1)))
    tried = window.try_out(deployment(3), 0.05)
    assert (numbers(tried), tried.canary) == ([2, 3, 1], Canary(version=3, share=0.05))
    assert tried.default.version == 2
    wider = tried.try_out(deployment(3), 0.5)
    assert (numbers(wider), wider.canary) == ([2, 3, 1], Canary(version=3, share=0.5))
    promoted = wider.promote(deployment(3))
    assert (numbers(promoted), promoted.canary) == ([3, 2], None)


def test_another_promotion_leaves_the_canary_where_it_is():
    """And another canary takes its place: who has the first one holds a version that is served no more."""
    window = Window(versions=(deployment(2),)).try_out(deployment(3), 0.1)
    promoted = window.promote(deployment(4))
    assert (numbers(promoted), promoted.canary) == ([4, 3, 2], Canary(version=3, share=0.1))
    assert numbers(window.try_out(deployment(5), 0.1)) == [2, 5, 3]


def test_a_version_that_was_taken_back_is_not_served_and_not_offered_again():
    """Of a canary the default stays as it was; of the default the one before it is the default."""
    window = Window(versions=(deployment(2), deployment(1))).try_out(deployment(3), 0.1).halt(halted(3))
    assert (numbers(window), window.canary, window.halted) == ([2, 1], None, (halted(3),))
    for again in (lambda: window.try_out(deployment(3), 0.1), lambda: window.promote(deployment(3))):
        with pytest.raises(ConfigError, match=r"shop:3 was taken back \(worse\)"):
            again()
    before = window.halt(halted(2))
    assert (numbers(before), before.halted) == ([1], (halted(3), halted(2)))
    with pytest.raises(ConfigError, match="shop:1 is the only version that is served"):
        before.halt(halted(1))


def test_with_a_canary_alone_beside_it_the_default_cannot_be_taken_back():
    """A canary is what is not known to be good."""
    window = Window(versions=(deployment(2),)).try_out(deployment(3), 0.1)
    with pytest.raises(ConfigError, match="shop:2 is the only version that is served"):
        window.halt(halted(2))


def test_the_default_is_no_canary():
    """All devices fetch it already."""
    with pytest.raises(ConfigError, match="shop:2 is the default already"):
        Window(versions=(deployment(2),)).try_out(deployment(2), 0.1)


def test_a_shadow_is_served_beside_the_window_until_it_is_a_canary():
    """Devices are told nothing of it; with a canary both are beside the default; taken back, it leaves alone."""
    window = Window(versions=(deployment(2), deployment(1))).shade(deployment(3), 0.1)
    assert (numbers(window), window.shadow, window.canary) == ([2, 3, 1], Shadow(version=3, share=0.1), None)
    both = window.try_out(deployment(4), 0.5)
    assert (numbers(both), both.tried) == ([2, 4, 3, 1], 4)
    assert (numbers(both.halt(halted(3))), both.halt(halted(3)).canary) == ([2, 4, 1], Canary(version=4, share=0.5))
    canary = window.try_out(deployment(3), 0.05)
    assert (numbers(canary), canary.shadow, canary.canary) == ([2, 3, 1], None, Canary(version=3, share=0.05))
    with pytest.raises(ConfigError, match="shop:3 is the canary, which devices have: take it back first"):
        canary.shade(deployment(3), 0.1)
    promoted = window.promote(deployment(3))
    assert (numbers(promoted), promoted.shadow) == ([3, 2], None)


def test_a_shadow_on_devices_is_kept_and_one_that_is_not_is_written_as_ever(tmp_path: Path):
    """A worker of before there were any reads a file without the field, and a file without it is one without."""
    deployment(2).write(tmp_path)
    for devices in (False, True):
        to = partial(Window.shade, deployment=deployment(3), share=0.1, devices=devices)
        change(tmp_path, "shop", to, action="shadow", version=3, share=0.1, devices=devices)
        written = json.loads((tmp_path / "shop.json").read_text())["shadow"]
        assert written == {"version": 3, "share": 0.1} | ({"devices": True} if devices else {})
        assert Window.read(tmp_path / "shop.json").shadow == Shadow(version=3, share=0.1, devices=devices)
    assert [done.devices for done in history(tmp_path, "shop")[-2:]] == [None, True]


def test_a_shadow_reads_what_the_default_reads():
    """It is given the same packed slots: of other features they would mean something else. Only a worker has any."""
    window, other = Window(versions=(deployment(2),)), Features.of({"size": Numeric(mean=2)})
    with pytest.raises(ConfigError, match="shop:3 reads other features of the server or of requests than 2"):
        window.shade(deployment(3).model_copy(update={"server": other}), 0.1)
    direct = deployment(2).model_copy(update={"serving": Serving(transport="direct")})
    with pytest.raises(ConfigError, match=r"serving.transport of shop must be 'kafka'"):
        Window(versions=(direct,)).shade(deployment(3), 0.1)


class Rollouts(RuleBasedStateMachine):
    """Whatever is promoted, tried out and taken back in whatever order, what is served makes sense."""

    @initialize()
    def begin(self) -> None:
        self.window = Window(versions=(deployment(1),))
        self.gone: set[int] = set()

    @rule(version=st.integers(1, 6), kept=st.integers(1, 3))
    def promote(self, version: int, kept: int) -> None:
        keeping = deployment(version).model_copy(update={"serving": Serving(versions=kept)})
        self._try(version, lambda: self.window.promote(keeping))

    @rule(version=st.integers(1, 6), share=st.floats(0.01, 1))
    def try_out(self, version: int, share: float) -> None:
        self._try(version, lambda: self.window.try_out(deployment(version), share))

    @rule(version=st.integers(1, 6), share=st.floats(0.01, 1))
    def shade(self, version: int, share: float) -> None:
        canary = self.window.canary
        self._try(version, lambda: self.window.shade(deployment(version), share), canary and canary.version)

    def _try(self, version, to, no_more=None) -> None:
        default = self.window.default.version
        try:
            self.window = to()
        except ConfigError:
            assert version in self.gone or version in (default, no_more)
        else:
            assert version not in self.gone

    @precondition(lambda self: len(self.window.versions) > 1)
    @rule(data=st.data())
    def halt(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(numbers(self.window)))
        before = self.window
        try:
            self.window = before.halt(halted(version))
        except ConfigError:  # nothing but a canary and a shadow is left
            assert version == before.default.version
            beside = [one.version for one in (before.canary, before.shadow) if one is not None]
            assert numbers(before) == [version, *beside]
        else:
            self.gone.add(version)
            assert version not in numbers(self.window)
            if version != before.default.version:
                assert self.window.default == before.default

    @invariant()
    def what_is_served_makes_sense(self) -> None:
        """Read again it is the same; as many versions as declared, and canary and shadow, which are two."""
        window = self.window
        assert Window.model_validate_json(window.model_dump_json()) == window
        assert not {*numbers(window)} & self.gone
        beside = [one.version for one in (window.canary, window.shadow) if one is not None]
        assert len(window.versions) <= window.default.serving.versions + len(beside)
        assert len({window.default.version, *beside}) == 1 + len(beside)


Rollouts.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestRollouts = Rollouts.TestCase


def widen(folder: Path, share: float) -> None:
    for _ in range(20):
        change(
            folder,
            "shop",
            lambda window: window.try_out(deployment(3), share),
            action="canary",
            version=3,
            share=share,
        )


def test_two_who_change_it_at_once_lose_nothing(tmp_path: Path):
    """A hundred changes by five processes: each is in the history, and the window is what the last one made of it."""
    deployment(2).write(tmp_path)
    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    processes = [multiprocessing.get_context("fork").Process(target=widen, args=(tmp_path, share)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done = history(tmp_path, "shop")
    assert [(one.action, one.version, one.default) for one in done[:2]] == [("promote", 2, 2), ("canary", 3, 2)]
    assert sorted(one.share for one in done[1:]) == sorted(shares * 20)
    assert Window.read(tmp_path / "shop.json").canary == Canary(version=3, share=done[-1].share)


def test_a_change_that_is_refused_leaves_window_and_history_as_they_were(tmp_path: Path):
    """And a history that is none is not taken for one."""
    file = deployment(2).write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        change(tmp_path, "shop", lambda window: window.halt(halted(2)), action="halt", version=2, reason="worse")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert history(tmp_path, "other") == ()
    (tmp_path / "shop.history").write_text(json.dumps({"action": "nothing"}) + "\n")
    with pytest.raises(ConfigError, match="one change a line"):
        history(tmp_path, "shop")
    assert Window.read(file).default == deployment(2)


def test_a_window_without_a_rollout_says_nothing_of_one(tmp_path: Path):
    """A gateway of before there were rollouts goes on reading what is promoted."""
    file = deployment(2).write(tmp_path)
    assert set(json.loads(file.read_text())) == {"versions"}
