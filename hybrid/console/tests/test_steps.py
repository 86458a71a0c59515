import pytest

from hybrid.console.steps import Changed, Seen, Step, question
from hybrid.deployment import Window
from hybrid.errors import ConfigError
from serving.testing import deployment

WINDOW = Window(versions=(deployment(1),)).promote(deployment(2)).try_out(deployment(4), 0.05)
SEEN = Seen(default=2, canary=4, share=0.05, served=(2, 4, 1))


def test_what_is_seen_of_a_window():
    """Default, canary, share and all that is served; of no window nothing."""
    assert Seen.of(WINDOW) == SEEN
    assert Seen.of(None) == Seen()
    assert SEEN.line() == "default 2, canary 4 on 5 % of devices, 1 still answered"


def test_no_device_goes_to_a_shadow():
    """Beside default 2 runs 5, for nobody: where 2 is taken back, devices go to 1; where 5 is, none has it."""
    seen = Seen.of(Window(versions=(deployment(1),)).promote(deployment(2)).shade(deployment(5), 0.1))
    assert seen.line() == "default 2, no canary, shadow 5 on 10 % of batches, 1 still answered"
    assert (seen.after(2), seen.after(5)) == (1, 2)
    asked = question(Step("halt", "shop", 5, reason="slow"), seen)
    assert asked.will[0].startswith("shop:5, the shadow, is served to nobody any more")
    assert "answers nobody" in asked.will[1]
    assert "It is the shadow no longer." in question(Step("canary", "shop", 5, share=0.05), seen).will


def test_a_shadow_on_devices_is_told_from_one_that_no_device_has():
    """With the same version and share they are different rollouts; taken back, devices remove what they have of it."""
    window = Window(versions=(deployment(2),))
    seen = Seen.of(window.shade(deployment(5), 0.1, devices=True))
    assert seen.line() == "default 2, no canary, shadow 5 on 10 % of batches, and of devices"
    assert (
        question(Step("halt", "shop", 5, reason="slow"), seen).will[1].endswith("and devices that have it remove it.")
    )
    with pytest.raises(Changed):
        seen.check(window.shade(deployment(5), 0.1))


def test_a_rollout_that_was_changed_is_refused_with_what_changed():
    """The canary grew: both are told. The same window passes."""
    SEEN.check(WINDOW)
    with pytest.raises(Changed, match=r"default 2, canary 4 on 5 % .*; now: default 2, canary 4 on 50 %.*Nothing was"):
        SEEN.check(WINDOW.try_out(deployment(4), 0.5))
    with pytest.raises(Changed, match="now: nothing is served"):
        SEEN.check(None)


@pytest.mark.parametrize(
    ("kind", "form", "step"),
    [
        ("canary", {"version": "3", "share": "7"}, Step("canary", "shop", 3, share=0.07)),
        ("canary", {"version": "3", "share": "0.1"}, Step("canary", "shop", 3, share=0.001)),
        ("promote", {"version": "3", "share": "7"}, Step("promote", "shop", 3)),
        ("halt", {"version": "3", "reason": " recall\r\n fell "}, Step("halt", "shop", 3, reason="recall fell")),
    ],
)
def test_a_form_is_a_step(kind, form, step):
    """With what its kind has; a reason is one line."""
    assert Step.of(kind, "shop", form) == step


@pytest.mark.parametrize(
    ("kind", "form", "said"),
    [
        ("delete", {"version": "3"}, "a step must be canary, promote or halt, got 'delete'"),
        ("promote", {}, "the version must be a number from 1, got ''"),
        ("promote", {"version": "0"}, "got '0'"),
        ("promote", {"version": "-1"}, "got '-1'"),
        ("promote", {"version": "١"}, "number from 1"),
        ("promote", {"version": "9" * 4000}, "got '9{40}'"),
        ("canary", {"version": "3", "share": "0"}, "above 0 and at most 100 %, got '0'"),
        ("canary", {"version": "3", "share": "nan"}, "got 'nan'"),
        ("canary", {"version": "3", "share": "100.1"}, r"got '100\.1'"),
        ("canary", {"version": "3"}, "got ''"),
        ("halt", {"version": "3", "reason": " "}, "the reason must have 1 to 500 characters, got 0"),
        ("halt", {"version": "3", "reason": "x" * 501}, "got 501"),
    ],
)
def test_a_form_that_is_no_step_is_a_sentence(kind, form, said):
    """It names the field, what it must be, and what it got, of which only the beginning."""
    with pytest.raises(ConfigError, match=said):
        Step.of(kind, "shop", form)


@pytest.mark.parametrize(
    ("step", "will", "final"),
    [
        (Step("canary", "shop", 3, share=0.1), "10 % of devices fetch shop:3 in place of 2", "keeps it"),
        (Step("canary", "shop", 3, share=0.1), "4 is the canary no longer", "keeps it"),
        (Step("canary", "shop", 4, share=0.5), "From 5 % to 50 % of devices fetch shop:4, the others 2", "keeps it"),
        (Step("promote", "shop", 4), "All devices fetch shop:4 from now on", "only where it is taken back"),
        (Step("promote", "shop", 3), "4 stays the canary of 5 % of devices", "only where"),
        (Step("promote", "shop", 1), "Devices that have a version after 1 keep it", "only where"),
        (Step("halt", "shop", 4, reason="r"), "told with their next update, and go to 2", "4 is"),
        (Step("halt", "shop", 2, reason="r"), "shop:2, the default, is served to nobody", "used up"),
        (Step("halt", "shop", 2, reason="r"), "and go to 1.", "used up"),
        (Step("halt", "shop", 1, reason="r"), "an older version that devices may still have", "used up"),
        (Step("halt", "shop", 4, reason="it failed"), "“it failed”", "control plane's key"),
    ],
)
def test_a_question_says_what_happens_to_which_version_and_what_stays(step, will, final):
    """In words that name the numbers."""
    asked = question(step, SEEN)
    assert will in " ".join(asked.will)
    assert final in " ".join(asked.final)
    assert str(step.version) in asked.title


def test_only_what_is_not_served_yet_is_exported():
    """Of version 3 it is said that it takes its time; of the canary it is not."""
    assert "exported first" in " ".join(question(Step("promote", "shop", 3), SEEN).will)
    assert "exported first" not in " ".join(question(Step("promote", "shop", 4), SEEN).will)


@pytest.mark.parametrize(
    ("step", "seen", "said"),
    [
        (Step("canary", "shop", 3, share=0.1), Seen(), "nothing is served of shop yet: promote a version first"),
        (Step("canary", "shop", 2, share=0.1), SEEN, "shop:2 is the default already"),
        (Step("canary", "shop", 4, share=0.05), SEEN, "the share must be above 5 %, got 5 %"),
        (Step("promote", "shop", 2), SEEN, "shop:2 is the default already"),
        (Step("halt", "shop", 7, reason="r"), SEEN, "shop:7 is not served"),
        (Step("halt", "shop", 2, reason="r"), Seen(2, 4, 0.05, served=(2, 4)), "only version to go back to"),
        (Step("halt", "shop", 2, reason="r"), Seen(2, served=(2,)), "promote another first"),
    ],
)
def test_what_cannot_be_done_is_not_asked(step, seen, said):
    """A sentence says why."""
    with pytest.raises(ConfigError, match=said):
        question(step, seen)


def test_the_default_after_a_halt_is_what_the_window_makes_it():
    """Of each version that is served: the words and the deed agree."""
    from hybrid.deployment import Halted

    for version in SEEN.served:
        after = WINDOW.halt(Halted(version=version, reason="r", signed=""))
        assert SEEN.after(version) == after.default.version
