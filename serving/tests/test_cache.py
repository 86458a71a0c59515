"""What a cached row or embedding may stand for."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import Unavailable
from serving.cache import ENTRY_BYTES, TOWERS, CachedModels, CachedReader
from serving.testing import SumModels

ROW = ENTRY_BYTES + 4 * 1 + 16  # a row of one slot
REREAD_MS, MAX_AGE_MS = 10, 25


class Store:
    """A feature store of one slot: entity -> (slot, event time); it notes what was asked, and when."""

    def __init__(self, **rows):
        self.rows, self.asked, self.down = rows, [], False

    def read(self, entities, now_ms):
        if self.down:
            raise Unavailable("down")
        self.asked.append((now_ms, list(entities)))
        found = [self.rows.get(entity) for entity in entities]
        ages = [-1 if row is None else max(now_ms - row[1], 0) for row in found]
        status = [
            "unknown_entity" if row is None else "ok" if age <= MAX_AGE_MS else "stale_features"
            for row, age in zip(found, ages, strict=True)
        ]
        slots = [[row[0] if row and code == "ok" else np.nan] for row, code in zip(found, status, strict=True)]
        return SimpleNamespace(
            slots=np.array(slots, np.float32).reshape(-1, 1),
            age_ms=np.array(ages, np.int64),
            status=np.array(status, dtype=object),
        )


def cached(store, entries=4, reread_ms=REREAD_MS, **options):
    limits = {"reread_s": reread_ms / 1000, "max_age_s": MAX_AGE_MS / 1000, "max_bytes": entries * ROW}
    return CachedReader(store, width=1, **limits, **options)


def read(reader, *entities, at):
    rows = reader.read(list(entities), at)
    return list(zip(rows.slots[:, 0].tolist(), rows.age_ms.tolist(), rows.status.tolist(), strict=True))


def test_a_row_is_used_again_with_the_age_that_its_features_have_by_now():
    """True at 95, read at 100: at 104 it is 9 ms old, and the store was asked once."""
    store = Store(bakery=(7.0, 95))
    reader = cached(store)
    assert read(reader, "bakery", at=100) == [(7.0, 5, "ok")]
    assert read(reader, "bakery", "bakery", at=104) == [(7.0, 9, "ok")] * 2
    assert store.asked == [(100, ["bakery"])]


def test_only_what_is_not_known_is_read_and_every_row_keeps_its_place():
    """kiosk was not there; the unknown one says so between them."""
    store = Store(bakery=(7.0, 100), kiosk=(8.0, 100))
    reader = cached(store)
    read(reader, "bakery", at=100)
    assert [row[::2] for row in read(reader, "kiosk", "bakery", at=100)] == [(8.0, "ok"), (7.0, "ok")]
    assert [row[2] for row in read(reader, "zz", "bakery", at=100)] == ["unknown_entity", "ok"]
    assert [entities for _, entities in store.asked] == [["bakery"], ["kiosk"], ["zz"]]


def test_a_materialised_change_is_seen_within_the_declared_time():
    """Changed at once after a read at 100; 10 ms later the new value is served."""
    store = Store(bakery=(7.0, 100))
    reader = cached(store)
    read(reader, "bakery", at=100)
    store.rows["bakery"] = (8.0, 101)
    assert [read(reader, "bakery", at=at)[0][0] for at in (109, 110)] == [7.0, 8.0]


def test_features_that_grow_too_old_meanwhile_are_read_again_and_refused():
    """25 ms are allowed: at 106 those of 81 are served, at 107 they are stale."""
    reader = cached(Store(bakery=(7.0, 81)))
    assert [read(reader, "bakery", at=at)[0][1:] for at in (100, 106)] == [(19, "ok"), (25, "ok")]
    assert read(reader, "bakery", at=107)[0][1:] == (26, "stale_features")


def test_an_unknown_entity_is_seen_as_soon_as_it_is_materialised():
    """What cannot be served is not kept."""
    store = Store()
    reader = cached(store)
    assert read(reader, "bakery", at=100)[0][2] == "unknown_entity"
    store.rows["bakery"] = (7.0, 100)
    assert read(reader, "bakery", at=100)[0][2] == "ok"


def test_a_clock_that_was_set_back_keeps_no_entry_alive():
    """At 99 an entry of 100 is of a time that has not come."""
    store = Store(bakery=(7.0, 90))
    reader = cached(store)
    for at in (100, 99):
        read(reader, "bakery", at=at)
    assert [at for at, _ in store.asked] == [100, 99]


@pytest.mark.parametrize("limits", [{"entries": 0}, {"reread_ms": 0}])
def test_it_can_be_turned_off(limits):
    """Without room, or without time, each read goes to the store."""
    store = Store(bakery=(7.0, 100))
    reader = cached(store, **limits)
    assert [read(reader, "bakery", at=100) for _ in range(2)] == [[(7.0, 0, "ok")]] * 2
    assert len(store.asked) == 2


def test_where_the_store_fails_what_was_last_read_is_given_with_its_true_age():
    """True at 95, read at 100; down at 112, when it would be read again: "unavailable", with the slot, 17 ms old.

    What was read less than 10 ms ago needs no store; of what never was there is nothing.
    """
    store = Store(bakery=(7.0, 95))
    reader = cached(store)
    read(reader, "bakery", at=100)
    store.down = True
    assert read(reader, "bakery", at=109) == [(7.0, 14, "ok")]
    assert read(reader, "bakery", at=112) == [(7.0, 17, "unavailable")]
    assert read(reader, "bakery", "kiosk", at=112)[1][1:] == (-1, "unavailable")
    store.down = False
    store.rows["bakery"] = (8.0, 110)
    assert read(reader, "bakery", at=113) == [(8.0, 3, "ok")]


def test_features_that_grew_too_old_answer_for_no_store():
    """25 ms are allowed: at 120 those of 95 are given, at 121 nothing is."""
    store = Store(bakery=(7.0, 95))
    reader = cached(store)
    read(reader, "bakery", at=100)
    store.down = True
    assert [read(reader, "bakery", at=at)[0][1:] for at in (120, 121)] == [(25, "unavailable"), (-1, "unavailable")]


def test_an_entity_that_was_seen_to_be_gone_is_not_remembered():
    """Read, deleted, read again, and then the store fails: what was erased does not come back."""
    store = Store(bakery=(7.0, 100))
    reader = cached(store)
    read(reader, "bakery", at=100)
    del store.rows["bakery"]
    assert read(reader, "bakery", at=110)[0][2] == "unknown_entity"
    store.down = True
    assert read(reader, "bakery", at=111)[0][1:] == (-1, "unavailable")


def test_what_answers_for_the_store_is_kept_also_where_every_row_is_read():
    """`reread_s` of 0 says how late a change may be seen, not what is kept for an outage."""
    store = Store(bakery=(7.0, 100))
    reader = cached(store, reread_ms=0)
    read(reader, "bakery", at=100)
    store.down = True
    assert read(reader, "bakery", at=100) == [(7.0, 0, "unavailable")]


def test_without_room_there_is_nothing_to_answer_with():
    """And the failure is still told row by row."""
    store = Store(bakery=(7.0, 100))
    reader = cached(store, entries=0)
    read(reader, "bakery", at=100)
    store.down = True
    assert read(reader, "bakery", at=100)[0][1:] == (-1, "unavailable")


def test_a_store_that_hangs_is_left_alone_for_a_second(caplog):
    """It takes 2 s to fail: those who ask in the second after that do not wait, the first after it tries again.

    One that fails at once is asked every time. The log names no entity.
    """
    now, store = [100.0], Store()
    store.takes_s = 2.0

    def hang(entities, _):
        store.asked.append(now[0])
        now[0] += store.takes_s
        raise OSError(f"{entities} cannot be read")

    store.read = hang
    reader = cached(store, clock=lambda: now[0])
    for waited_s in (0.0, 0.5, 0.4, 0.2):  # asked at 100; fails at 102; 102.5 and 102.9 are within a second; 103.1
        now[0] += waited_s
        assert read(reader, "bakery", at=0)[0][2] == "unavailable"
    assert store.asked == pytest.approx([100, 103.1])
    store.takes_s = 0.1
    now[0] += 5
    for _ in range(3):
        read(reader, "bakery", at=0)
    assert len(store.asked) == 5
    assert "bakery" not in caplog.text


def test_while_one_tries_whether_a_hung_store_answers_the_others_do_not_wait():
    """The second asks within the first's trial; once that succeeds, all ask again."""
    now, store, inner = [100.0], Store(bakery=(7.0, 0)), []
    answer = store.read

    def fail(*_):
        now[0] += 1
        raise Unavailable("down")

    def succeed(entities, at):
        inner.append(read(reader, "bakery", at=0)[0][2])
        return answer(entities, at)

    store.read = fail
    reader = cached(store, clock=lambda: now[0])
    read(reader, "bakery", at=0)
    now[0] += 1
    store.read = succeed
    assert read(reader, "bakery", at=0) == [(7.0, 0, "ok")]
    assert inner == ["unavailable"]
    store.read = answer
    assert read(reader, "kiosk", at=0)[0][2] == "unknown_entity"


NAMES = ["a", "b", "c", "d", "e", "f"]
WRITE = st.tuples(st.just("write"), st.sampled_from(NAMES), st.integers(0, 30))
READ = st.tuples(st.just("read"), st.lists(st.sampled_from([*NAMES, "zz"]), min_size=1, max_size=8), st.none())
WAIT = st.tuples(st.just("wait"), st.none(), st.integers(1, 8))


@settings(max_examples=300)
@given(st.lists(st.one_of(WRITE, READ, WAIT), max_size=50))
def test_whatever_is_written_and_read_in_any_order(steps):
    """Each served row is one that the store held within the last 10 ms, with its true age, at most 25 ms; the
    rest says what the store says; and no more rows are kept than fit."""
    store, now = Store(), 1000
    reader, history = cached(store), {}
    for value, (step, which, amount) in enumerate(steps):
        if step == "wait":
            now += amount
        elif step == "write":
            if which in history:
                history[which][-1][2] = now  # until when it was true
            store.rows[which] = (float(value), now - amount)
            history.setdefault(which, []).append([float(value), now - amount, None])
        else:
            truth = store.read(which, now)
            for name, (slot, age, status), said in zip(which, read(reader, *which, at=now), truth.status, strict=True):
                if status != "ok":
                    assert status == said
                    continue
                assert age <= MAX_AGE_MS
                held = [(v, now - t) for v, t, until in history[name] if until is None or now - until < REREAD_MS]
                assert (slot, age) in held
        assert len(reader) <= 4


class LastRead:
    """What was last read of each entity: its slot, when that was true, and when it was read."""

    def __init__(self):
        self.rows = {}

    def fresh(self, name, now):
        _, true_ms, read_ms = self.rows.get(name, (0, -1_000, -1_000))
        return now - read_ms < REREAD_MS and now - true_ms <= MAX_AGE_MS

    def learn(self, names, found, now):
        """From an answer of a store that is there."""
        for name in {name for name in names if not self.fresh(name, now)}:
            slot, age, status = found[names.index(name)]
            self.rows[name] = (slot, now - age, now) if status == "ok" else (0, -1_000, -1_000)

    def told(self, name, now):
        """What is to be said of it while the store is away."""
        slot, true_ms, _ = self.rows.get(name, (0, -1_000, -1_000))
        if now - true_ms > MAX_AGE_MS:
            return -1, "unavailable"
        return slot, now - true_ms, "ok" if self.fresh(name, now) else "unavailable"


@settings(max_examples=300)
@given(st.lists(st.one_of(WRITE, READ, WAIT, st.tuples(st.just("turn"), st.none(), st.none())), max_size=50))
def test_whatever_is_read_while_the_store_comes_and_goes(steps):
    """While it is down each row is "ok" if it was read within the last 10 ms, else "unavailable" with exactly what
    was last read of its entity, if that was a row and is at most 25 ms old by now, and else with nothing."""
    store, now, last = Store(), 1000, LastRead()
    reader = cached(store, entries=len(NAMES))
    for value, (step, which, amount) in enumerate(steps):
        if step == "wait":
            now += amount
        elif step == "turn":
            store.down = not store.down
        elif step == "write":
            store.rows[which] = (float(value), now - amount)
        else:
            found = read(reader, *which, at=now)
            if store.down:
                assert [row[1:] if row[1] < 0 else row for row in found] == [last.told(name, now) for name in which]
            else:
                last.learn(which, found, now)


def test_the_bound_counts_what_python_takes():
    """2,000 rows of 20-letter entities take less memory than their share of `max_bytes`."""
    names = [f"entity-{number:013d}" for number in range(2000)]
    store = Store(**dict.fromkeys(names, (1.0, 0)))
    tracemalloc.start()
    reader = cached(store, entries=2000)
    for name in names:
        read(reader, "".join(name), at=0)
        store.asked.clear()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader) == 2000
    assert used < 2000 * ROW


def embed(models, *rows, version=1):
    """The first number of each embedding: `SumModels` sums a row."""
    return models.infer("tower", version, {"slots": np.array(rows, np.float32)}, "embedding")[:, 0].tolist()


def test_a_cache_of_features_counts_what_it_was_asked_for():
    """Two are new, then one of two is; after 10 ms all are read again; the unknown one is never kept."""
    reader = cached(Store(bakery=(7.0, 100), kiosk=(8.0, 100)))
    seen = []
    for entities, at in ((("bakery", "zz"), 100), (("bakery", "kiosk"), 101), (("bakery",), 110)):
        read(reader, *entities, at=at)
        seen.append((reader.hits, reader.misses, reader.bytes))
    assert seen == [(0, 2, ROW), (1, 3, 2 * ROW), (1, 4, 2 * ROW)]


def test_a_cache_of_embeddings_counts_what_it_was_asked_for():
    """Inputs 1 and 2 are new, then 1 is known and 3 is not; an entry is a key of 4 bytes and an embedding of 8."""
    models, seen = CachedModels(SumModels()), []
    for inputs in ([1, 2], [1, 3]):
        models.infer("shop", 1, {"slots": np.array(inputs, np.float32)[:, None]}, "embedding")
        seen.append((models.hits, models.misses, models.bytes))
    entry = ENTRY_BYTES + 4 + 8
    assert seen == [(0, 2, 2 * entry), (1, 3, 3 * entry)]


def test_a_tower_runs_once_for_each_input_that_differs():
    """Three rows of which two are alike, then two of which one is new: two rows run, then one."""
    models = SumModels()
    kept = CachedModels(models)
    assert embed(kept, [1, 2], [3, 4], [1, 2]) == [3, 7, 3]
    assert embed(kept, [5, 5], [3, 4]) == [10, 7]
    assert embed(kept, [3, 4]) == [7]
    assert models.calls == [("tower", 1, 2), ("tower", 1, 1)]


def test_how_long_the_caller_waits_is_handed_on():
    """For a tower whose embedding is not kept yet, for a head, and where nothing is kept at all."""
    models, slots = SumModels(), np.ones((1, 2), np.float32)
    for kept in (CachedModels(models), CachedModels(models, max_bytes=0)):
        kept.infer("tower", 1, {"slots": slots}, "embedding", 7.0)
        kept.infer("head", 1, {"server": slots, "device": slots}, "prediction", 8.0)
    assert models.until_s == [7.0, 8.0, 7.0, 8.0]


def test_each_version_has_embeddings_of_its_own():
    """Version 2 computes what version 1 knows."""
    models = SumModels()
    kept = CachedModels(models)
    for version in (1, 2, 1):
        embed(kept, [1, 2], version=version)
    assert models.calls == [("tower", 1, 1), ("tower", 2, 1)]


def test_a_head_always_runs():
    """It reads the device's side, which is never kept."""
    models = SumModels()
    kept = CachedModels(models)
    one = np.ones((1, 2), np.float32)
    for _ in range(2):
        kept.infer("head", 1, {"server": one, "device": one}, "prediction")
    assert len(models.calls) == 2


def test_a_missing_number_is_an_input_of_its_own():
    """NaN is not 0, and is found again."""
    models = SumModels()
    kept = CachedModels(models)
    for row in ([0.0, 0.0], [np.nan, 0.0], [np.nan, 0.0]):
        embed(kept, row)
    assert [rows for _, _, rows in models.calls] == [1, 1]


def test_a_failure_is_not_kept():
    """The next call runs."""
    models = SumModels(broken=True)
    kept = CachedModels(models)
    with pytest.raises(Unavailable):
        embed(kept, [1, 2])
    models.broken = False
    assert embed(kept, [1, 2]) == [3]


@pytest.mark.parametrize("max_bytes", [0, 1])
def test_without_room_every_row_runs(max_bytes):
    """Not even one entry fits."""
    models = SumModels()
    kept = CachedModels(models, max_bytes)
    assert [embed(kept, [1, 2]), embed(kept, [1, 2])] == [[3], [3]]
    assert len(models.calls) == 2


def test_only_some_towers_are_kept():
    """One more than `TOWERS`: the first has to compute again."""
    models = SumModels()
    kept = CachedModels(models)
    for version in [*range(TOWERS + 1), TOWERS, 0]:
        embed(kept, [1, 2], version=version)
    assert [version for _, version, _ in models.calls] == [*range(TOWERS + 1), 0]


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=20), st.integers(1, 5))
def test_whatever_is_computed_in_any_order_with_any_room(batches, entries):
    """Every embedding is the one that the tower gives, in its row."""
    kept = CachedModels(SumModels(), max_bytes=entries * (ENTRY_BYTES + 4 * 1 + 4 * 2))
    for batch in batches:
        assert embed(kept, *([value] for value in batch)) == batch
