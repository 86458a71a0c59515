import gzip
from datetime import timedelta

import numpy as np
import pytest

from hybrid import Label
from hybrid.errors import ConfigError, NotFound
from hybrid.federation.population import Examples, Population, examples, import_table, names
from hybrid.workspace import Workspace

CSV = b"""person,offer_id,hour,age,clicked,at,score
ada,o1,7AM,30,1,2024-01-02T00:00:00,0.5
bob,o2,,40,0,2024-01-01T00:00:00,2
ada,o2,2PM,,0,2024-01-01T00:00:00,1
cy,o1,7AM,20,,2024-01-05T00:00:00,0
"""


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def clicks(tmp_path):
    file = tmp_path / "clicks.csv.gz"
    file.write_bytes(gzip.compress(CSV))
    return file


def test_an_import_groups_the_rows_of_each_user_in_the_order_of_time(clicks, workspace):
    """Ada's two rows are neighbours, the earlier first, and nobody's row is lost."""
    population = import_table(clicks, user="person", time="at", name="clicks", workspace=workspace)
    assert population.users == 3
    rows = list(zip(population.column("offer_id"), population.column("hour"), strict=True))
    ada = rows.index(("o2", "2PM"))
    assert rows[ada + 1] == ("o1", "7AM")
    assert ada in population.offsets
    assert sorted(np.diff(population.offsets)) == [1, 1, 2]


def test_missing_values_stay_missing(clicks, workspace):
    """An empty text is None, an empty number NaN: what the transforms call missing."""
    population = import_table(clicks, user="person", name="clicks", workspace=workspace)
    assert None in list(population.column("hour"))
    assert np.isnan(population.column("age")).sum() == 1


def test_a_population_keeps_no_user_id(clicks, workspace):
    """Neither its columns nor any byte on disk names a person."""
    population = import_table(clicks, user="person", name="clicks", workspace=workspace)
    assert "person" not in population.table.column_names
    stored = b"".join(file.read_bytes() for file in (workspace.populations / "clicks").iterdir())
    assert b"ada" not in stored
    assert b"bob" not in stored


def test_a_population_opens_as_it_was_imported(clicks, workspace):
    """`open` maps the same rows, offsets and buckets, and `names` lists it."""
    made = import_table(clicks, user="person", time="at", name="clicks", workspace=workspace)
    opened = Population.open("clicks", workspace)
    assert opened.table.equals(made.table)
    assert opened.time == "at"
    np.testing.assert_array_equal(opened.offsets, made.offsets)
    np.testing.assert_array_equal(opened.buckets, made.buckets)
    assert names(workspace) == ["clicks"]


def test_a_taken_name_is_refused_unless_replaced(clicks, workspace):
    """A second import under one name is an error; with replace it takes its place."""
    import_table(clicks, user="person", name="clicks", workspace=workspace)
    with pytest.raises(ConfigError, match="exists already"):
        import_table(clicks, user="person", name="clicks", workspace=workspace)
    import_table(clicks, user="person", name="clicks", workspace=workspace, replace=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "nobody"}, "must have a column 'nobody'"),
        ({"time": "hour"}, "must hold a timestamp in every row"),
        ({"user": "hour"}, "got 1 missing values"),
        ({"name": "../escape"}, "lower-case letters"),
    ],
)
def test_an_unfit_import_is_refused_and_leaves_nothing(clicks, workspace, change, message):
    """Each message names the column or name, and no population appears."""
    with pytest.raises(ConfigError, match=message):
        import_table(clicks, **{"user": "person", "name": "clicks", "workspace": workspace} | change)
    assert names(workspace) == []


def test_a_file_of_another_kind_is_refused(tmp_path, workspace):
    """The message says which kinds there are."""
    (tmp_path / "rows.xlsx").write_bytes(b"?")
    with pytest.raises(ConfigError, match=r"\.csv, \.csv\.gz or \.parquet"):
        import_table(tmp_path / "rows.xlsx", user="u", name="rows", workspace=workspace)


def test_an_unknown_population_is_not_found(workspace):
    """The message says what makes one."""
    with pytest.raises(NotFound, match="hybrid population import"):
        Population.open("nobody", workspace)


def _people(count):
    rng = np.random.default_rng(0)
    return Population("p", np.arange(count + 1), rng.integers(0, 1 << 16, count).astype(np.uint16), None, None)


def test_folds_hold_out_every_user_once():
    """Over five folds each of 2,000 users is held out exactly once, about 400 at a time."""
    people = _people(2000)
    held = np.stack([people.fold(k, 5) for k in range(1, 6)])
    assert (held.sum(axis=0) == 1).all()
    assert held.sum(axis=1) == pytest.approx(np.full(5, 400), abs=80)


def test_a_fold_depends_on_the_user_and_the_seed_alone():
    """The users asked for, in another order, get the same answer; another seed cuts otherwise."""
    people = _people(500)
    reverse = Population("p", people.offsets, people.buckets[::-1], None, None)
    np.testing.assert_array_equal(people.fold(2, 5), reverse.fold(2, 5)[::-1])
    assert (people.fold(2, 5) != people.fold(2, 5, seed=1)).any()


@pytest.mark.parametrize(("k", "n"), [(0, 5), (6, 5), (1, 1)])
def test_a_fold_out_of_range_is_refused(k, n):
    """Folds count from 1, and there are at least two."""
    with pytest.raises(ConfigError, match=f"got {k}/{n}"):
        _people(3).fold(k, n)


def test_examples_are_what_the_transforms_make_of_the_rows(clicks, workspace, tiny_model):
    """Bob's missing hour is the vocabulary's last index; his age 40 is (40 - 30) / 10 = 1."""
    population = import_table(clicks, user="person", name="clicks", workspace=workspace)
    model = tiny_model(label=Label(column="clicked", visible_to="server", window=timedelta(days=1), absent=0))
    found = examples(model, population, np.zeros((4, 1), np.float32))
    assert len(found) == 4
    bob = int(np.flatnonzero(found.device[:, 0] == 1)[0])
    np.testing.assert_array_equal(found.device[bob], [1, 0])
    # the server feature's value and flag, then 7AM, 2PM, unseen, missing
    np.testing.assert_array_equal(found.server[bob], [0, 0, 0, 0, 0, 1])
    assert found.labels.sum() == 1


def test_a_row_without_label_is_no_example_unless_absence_means_something(clicks, workspace, tiny_model):
    """Cy's only row has no label: it is dropped, Cy stays with none; with absent=0 it counts."""
    population = import_table(clicks, user="person", name="clicks", workspace=workspace)
    found = examples(tiny_model(), population, np.zeros((4, 1), np.float32))
    assert (len(found), found.users) == (3, 3)
    assert sorted(np.diff(found.offsets)) == [0, 1, 2]


def test_labels_other_than_0_and_1_are_refused(clicks, workspace, tiny_model):
    """The message names the column and shows no value."""
    population = import_table(clicks, user="person", name="clicks", workspace=workspace)
    for column, got in (("at", "datetime64"), ("score", "other numbers")):
        wrong = tiny_model(label=Label(column=column, visible_to="server"))
        with pytest.raises(ConfigError, match=f"'{column}' must hold 0 or 1, got {got}"):
            examples(wrong, population, np.zeros((4, 1), np.float32))


def test_examples_of_some_users_keep_their_rows_together():
    """Users 0 and 2 of three, with 1, 2 and 2 rows, keep rows 0, 3 and 4."""
    rows = np.arange(5, dtype=np.float32)
    whole = Examples(rows[:, None], rows[:, None], rows, np.array([0, 1, 3, 5]))
    some = whole.of(np.array([True, False, True]))
    assert some.labels.tolist() == [0, 3, 4]
    assert some.offsets.tolist() == [0, 1, 3]
    assert some.user_of_row.tolist() == [0, 1, 1]
