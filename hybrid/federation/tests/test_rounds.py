import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.federation.rounds import MOST_UPLOADS, Answer, OpenSum, Uploads
from hybrid.plan import Local, TrainPlan
from hybrid.privacy.mechanisms import clip_rows
from hybrid.update import encode, head, length

END_MS = 10_000
NAN, INF = float("nan"), float("inf")


def plan(parameters=2, clip=5.0, upload="float32"):
    local = Local(steps=1, lr=0.1)
    about = {"model": "m", "version": 1, "definition_hash": "ab" * 32, "local": local, "expires_ms": END_MS}
    return TrainPlan(id="0" * 32, clip=clip, upload=upload, parameters=parameters, **about)


def body(*values):
    return head(len(values), "float32") + np.array(values, "<f4").tobytes()


def name(number):
    return f"{number:032x}"


class OpenRound:
    """One plan, and the one sum that its uploads go into."""

    def __init__(self, asked, most=MOST_UPLOADS):
        self._uploads, self._sum = Uploads(asked), OpenSum(asked.parameters, most)

    def take(self, upload, content, now_ms, weight=1.0):
        return self._uploads.take(upload, content, now_ms, self._sum, weight)

    def close(self):
        total, self._sum = self._sum.close(), None
        return total


def test_an_update_is_weighed_after_the_clip():
    """(30, 40) is clipped to (3, 4), and half of it is (1.5, 2); (1, 2) at a quarter is (0.25, 0.5)."""
    opened = OpenRound(plan())
    opened.take(name(1), body(30, 40), 0, 0.5)
    opened.take(name(2), body(1, 2), 0, 0.25)
    np.testing.assert_allclose(opened.close().total, [1.75, 2.5])


@pytest.mark.parametrize("weight", [0.0, 1.0001, NAN, -1.0])
def test_no_weight_is_above_one(weight):
    with pytest.raises(AssertionError):
        OpenRound(plan()).take(name(1), body(1, 2), 0, weight)


def test_uploads_are_clipped_and_summed():
    """(30, 40) has norm 50; clipped to 5 it is (3, 4). (0.3, 0.4) stays."""
    opened = OpenRound(plan())
    assert opened.take(name(1), body(30, 40), 0) is Answer.COUNTED
    assert opened.take(name(2), body(0.25, 0.5), 0) is Answer.COUNTED
    total = opened.close()
    np.testing.assert_allclose(total.total, [3.25, 4.5])
    assert (total.received, total.below, total.above) == (2, 1, 1)


def test_a_repeat_is_counted_once_and_other_bytes_under_its_id_are_refused():
    """Also after the end, where a device asks again because it lost the answer."""
    opened = OpenRound(plan())
    opened.take(name(1), body(1, 2), 0)
    assert opened.take(name(1), body(1, 2), 1) is Answer.REPEATED
    assert opened.take(name(1), body(1, 3), 1) is Answer.OTHER_BYTES
    total = opened.close()
    assert opened.take(name(1), body(1, 2), END_MS + 1) is Answer.REPEATED
    assert opened.take(name(2), body(1, 2), END_MS + 1) is Answer.ENDED
    np.testing.assert_array_equal(total.total, [1, 2])
    assert total.received == 1


def test_the_clock_ends_it_before_it_is_closed():
    opened = OpenRound(plan())
    assert opened.take(name(1), body(1, 2), END_MS - 1) is Answer.COUNTED
    assert opened.take(name(2), body(1, 2), END_MS) is Answer.ENDED


@pytest.mark.parametrize("values", [(NAN, 1), (INF, 1), (1, -INF)])
def test_what_is_not_finite_takes_part_and_adds_nothing(values):
    """It is answered like any other update, so that nobody learns that it was not."""
    opened = OpenRound(plan())
    assert opened.take(name(1), body(*values), 0) is Answer.COUNTED
    assert opened.take(name(1), body(*values), 0) is Answer.REPEATED
    total = opened.close()
    np.testing.assert_array_equal(total.total, [0, 0])
    assert (total.received, total.below, total.above) == (1, 0, 0)


@pytest.mark.parametrize("scale", [NAN, INF, -1.0, 3e38])
def test_a_scale_that_makes_no_numbers_adds_nothing(scale):
    opened = OpenRound(plan(upload="int8"))
    sent = head(2, "int8") + np.array([scale], "<f4").tobytes() + bytes([127, 127])
    assert opened.take(name(1), sent, 0) is Answer.COUNTED
    np.testing.assert_array_equal(opened.close().total, [0, 0])


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        body(1, 2)[:-1],
        body(1, 2) + b"\0",
        body(1, 2, 3),
        b"f64 " + body(1, 2)[4:],
        head(3, "float32") + body(1, 2)[8:],
        head(2, "int8") + bytes(8),
    ],
    ids=["empty", "short", "long", "more weights", "encoding", "says more weights", "another encoding"],
)
def test_a_body_of_another_form_than_the_plans_is_malformed_and_leaves_nothing(sent):
    opened = OpenRound(plan())
    assert opened.take(name(1), sent, 0) is Answer.MALFORMED
    assert opened.take(name(1), body(1, 2), 0) is Answer.COUNTED
    assert opened.close().received == 1


def test_a_full_round_takes_no_more():
    opened = OpenRound(plan(), most=1)
    opened.take(name(1), body(1, 2), 0)
    assert opened.take(name(2), body(1, 2), 0) is Answer.FULL
    assert opened.take(name(1), body(1, 2), 0) is Answer.REPEATED


def test_the_sum_is_fixed_once_it_is_closed():
    opened = OpenRound(plan())
    total = opened.close()
    with pytest.raises(ValueError, match="read-only"):
        total.total += 1


bodies = st.one_of(
    st.binary(max_size=40),
    st.lists(st.floats(width=32), min_size=3, max_size=3).map(lambda values: body(*values)),
    st.binary(min_size=3, max_size=3).flatmap(
        lambda values: st.binary(min_size=4, max_size=4).map(lambda scale: head(3, "int8") + scale + values)
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    sent=st.lists(st.tuples(st.integers(0, 9), bodies, st.floats(0.01, 1)), max_size=12),
    upload=st.sampled_from(["float32", "int8"]),
)
def test_whatever_comes_under_one_id_moves_the_sum_by_the_clip_at_most(sent, upload):
    """All that one id sends, in any order among others', moves the sum by at most the clip, and no count but by one."""
    with_it, without = OpenRound(plan(3, 0.5, upload)), OpenRound(plan(3, 0.5, upload))
    for sender, content, weight in sent:
        with_it.take(name(sender), content, 0, weight)
        if sender != 0:
            without.take(name(sender), content, 0, weight)
    one, other = with_it.close(), without.close()
    assert np.linalg.norm(one.total - other.total) <= 0.5 * (1 + 1e-12)
    assert 0 <= one.received - other.received <= 1
    assert 0 <= (one.below + one.above) - (other.below + other.above) <= 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), upload=st.sampled_from(["float32", "int8"]), users=st.integers(0, 20))
def test_the_sum_does_not_depend_on_the_order_nor_on_repeats(seed, upload, users):
    """It is the sum of the clipped updates, each as it was read from its bytes, to float64's rounding."""
    random = np.random.default_rng(seed)
    updates = random.normal(size=(users, 300)).astype(np.float32)
    sent = [encode(update, upload, random) for update in updates]
    assert {len(one) for one in sent} <= {length(300, upload)}
    totals = []
    for _ in range(2):
        opened = OpenRound(plan(300, 5.0, upload))
        for user in random.permutation(np.repeat(np.arange(users), 2)):
            opened.take(name(user), sent[user], 0)
        totals.append(opened.close())
    np.testing.assert_allclose(totals[0].total, totals[1].total, atol=1e-12)
    assert totals[0].received == users
    # A block's rounding moves each weight by less than a 127th of its largest.
    most = 0 if upload == "float32" else users * np.abs(updates).max(initial=0) / 127
    np.testing.assert_allclose(totals[0].total, clip_rows(updates, 5.0).sum(axis=0), atol=1e-5 + 2 * most)
