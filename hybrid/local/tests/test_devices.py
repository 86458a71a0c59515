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
