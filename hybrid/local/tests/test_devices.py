import numpy as np

from hybrid.local.devices import People


def test_some_people_have_their_own_rows_and_no_others():
    """Of three with 2, 0 and 3 rows, the last two: three rows, all of the third's."""
    rows = np.arange(5, dtype=np.float32)
    people = People(
        offsets=np.array([0, 2, 2, 5]),
        entity=list("aabcd"),
        request={"hour": [0, 1, 2, 3, 4]},
        features={"mood": ["m0", "m1", "m2", "m3", "m4"]},
        server=rows[:, None],
        labels=rows,
    )
    some = people.of(range(1, 3))
    assert (some.users, some.offsets.tolist(), some.entity) == (2, [0, 0, 3], list("bcd"))
    assert (some.request, some.features) == ({"hour": [2, 3, 4]}, {"mood": ["m2", "m3", "m4"]})
    assert (some.server[:, 0].tolist(), some.labels.tolist()) == ([2, 3, 4], [2, 3, 4])


def test_a_second_device_has_its_persons_rows():
    """Of two people with 2 and 1 rows, the first has another: it stands behind both, and nothing of theirs changes."""
    rows = np.arange(3, dtype=np.float32)
    people = People(
        offsets=np.array([0, 2, 3]),
        entity=list("aab"),
        request={"hour": [0, 1, 2]},
        features={"mood": ["m0", "m1", "m2"]},
        server=rows[:, None],
        labels=rows,
    )
    twice = people.twice(1)
    assert (twice.users, twice.offsets.tolist(), twice.entity) == (3, [0, 2, 3, 5], list("aabaa"))
    assert (twice.request, twice.features) == ({"hour": [0, 1, 2, 0, 1]}, {"mood": ["m0", "m1", "m2", "m0", "m1"]})
    assert (twice.server[:, 0].tolist(), twice.labels.tolist()) == ([0, 1, 2, 0, 1], [0, 1, 2, 0, 1])
    assert people.twice(0).offsets.tolist() == [0, 2, 3]
