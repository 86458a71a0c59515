import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from hybrid.errors import ConfigError, Overloaded, Unavailable, UnknownEntity
from hybrid.spec import Serving
from serving.cache import CachedReader
from serving.direct import Direct
from serving.exchange import Limits
from serving.oip import Rows
from serving.readers import Readers
from serving.telemetry import Telemetry
from serving.testing import MemoryReader, SumModels, deployment

DIRECT = deployment().model_copy(update={"serving": Serving(transport="direct")})
KNOWN = {"bakery": (1.0, "ok"), "kiosk": (2.0, "ok")}


def rows(*entities, slot=0.0):
    n = len(entities)
    return Rows(np.array(entities, dtype=object), np.full((n, 2), slot, np.float32), np.zeros((n, 2), np.float32))


class Halting(SumModels):
    """The first call waits until it is let go."""

    def __init__(self):
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def infer(self, *arguments):
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(30)
        return super().infer(*arguments)


def direct(models=None, limits=None, open_reader=lambda _: MemoryReader(KNOWN), telemetry=None, now_ms=lambda: 1_000):
    limits = limits or Limits(deadline_s=30)
    return Direct(Readers(open_reader), models or SumModels(), now_ms, limits, telemetry)


def run(scenario, made):
    try:
        return asyncio.run(scenario(made))
    finally:
        made.close()


def test_a_request_is_merged_without_kafka():
    """bakery's slot is 1: the tower gives (1, 1), the head 2; its row is 5 ms old."""

    async def scenario(made):
        answers = await made.ask(deployment(), rows("bakery"))
        assert (answers.prediction.tolist(), answers.feature_age_ms.tolist()) == ([2.0], [5])
        assert (list(answers.status), list(answers.fallback)) == (["ok"], ["none"])

    run(scenario, direct())


def test_a_batch_is_counted_and_its_stages_timed_but_there_is_no_poll():
    """One row of two is known; no record was taken from Kafka."""
    telemetry = Telemetry()

    async def scenario(made):
        with pytest.raises(UnknownEntity):
            await made.ask(deployment(), rows("bakery", "nowhere"))

    run(scenario, direct(telemetry=telemetry))
    count = telemetry.registry.get_sample_value
    for code in ("ok", "unknown_entity"):
        assert count("hybrid_merge_rows_total", {"model": "shop", "version": "1", "code": code}) == 1
    stages = ("features", "forward", "encode")
    assert [count("hybrid_merge_stage_seconds_count", {"stage": stage}) for stage in stages] == [1, 1, 1]
    assert (count("hybrid_merge_batch_rows_sum"), count("hybrid_merge_poll_records_count")) == (2, 0)


def test_what_waits_while_a_batch_is_merged_leaves_together_as_the_next():
    """The first row goes alone; four that come meanwhile, of three callers, are one batch; each gets its own back."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        others = [
            asyncio.create_task(made.ask(deployment(), asked))
            for asked in (rows("kiosk"), rows("bakery", "kiosk"), rows("bakery", slot=1.0))
        ]
        await asyncio.sleep(0)
        models.go.set()
        found = [answers.prediction.tolist() for answers in await asyncio.gather(first, *others)]
        assert found == [[2.0], [4.0], [2.0, 4.0], [6.0]]
        assert [n for name, _, n in models.calls if name == "shop_head"] == [1, 4]

    run(scenario, direct(models))


def test_rows_of_two_versions_are_never_merged_together():
    """Each goes through its own pair."""
    models = Halting()

    async def scenario(made):
        asked = [asyncio.create_task(made.ask(deployment(v), rows("bakery"))) for v in (1, 2, 1)]
        await asyncio.to_thread(models.reached.wait, 30)
        models.go.set()
        await asyncio.gather(*asked)
        assert {(version, n) for _, version, n in models.calls} == {(1, 2), (2, 1)}

    run(scenario, direct(models))


def test_a_row_that_cannot_be_predicted_raises_its_error_for_its_caller_alone():
    """The other caller of the same batch is answered."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        lost = asyncio.create_task(made.ask(deployment(), rows("nowhere")))
        found = asyncio.create_task(made.ask(deployment(), rows("kiosk")))
        await asyncio.sleep(0)
        models.go.set()
        with pytest.raises(UnknownEntity, match="row 1 of 1"):
            await lost
        assert (await found).prediction.tolist() == [4.0]
        await first

    run(scenario, direct(models))


def test_a_declared_fallback_answers():
    """Without a row in the store, and with a constant declared."""

    async def scenario(made):
        served = deployment().model_copy(update={"serving": Serving(missing_entity="constant", constant=0.5)})
        answers = await made.ask(served, rows("nowhere"))
        assert (list(answers.status), list(answers.fallback)) == (["unknown_entity"], ["constant"])
        assert answers.prediction.tolist() == [0.5]

    run(scenario, direct())


def test_who_wants_the_contribution_is_given_it_and_who_shares_its_batch_is_not():
    """kiosk's slot is 2: the tower gives (2, 2); of a device that merges it is all that is given."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        served = deployment().model_copy(update={"serving": Serving(contribution=True)})
        without = asyncio.create_task(made.ask(served, rows("bakery")))
        given = asyncio.create_task(made.ask(served, replace(rows("kiosk"), contribution=2)))
        await asyncio.sleep(0)
        models.go.set()
        assert np.isnan((await without).server_embedding).all()
        found = await given
        assert (found.server_embedding.tolist(), found.prediction.tolist()) == ([[2.0, 2.0]], [4.0])
        await first
        asked = replace(rows("kiosk"), embedding=np.empty((1, 0), np.float32), contribution=2)
        found = await made.ask(deployment().model_copy(update={"merge": "device"}), asked)
        assert found.server_embedding.tolist() == [[2.0, 2.0]]
        assert found.expires_ms.tolist() == [1_000 - 5 + 60_000]

    run(scenario, direct(models))


def test_who_wants_slots_is_given_them_and_who_shares_its_batch_is_not():
    """kiosk's slot is 2; the hour's and the budget's are as they were asked with."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        what = {"serving": Serving(contribution=True), "contributes": "slots"}
        served = deployment().model_copy(update=what)
        without = asyncio.create_task(made.ask(served, rows("bakery")))
        given = asyncio.create_task(made.ask(served, replace(rows("kiosk"), slots=3)))
        await asyncio.sleep(0)
        models.go.set()
        assert np.isnan((await without).server_slots).all()
        found = await given
        np.testing.assert_array_equal(found.server_slots, [[2, *rows("kiosk").request[0]]])
        assert found.server_embedding.shape == (1, 0)
        await first

    run(scenario, direct(models))


def test_what_was_last_read_answers_for_a_store_that_fails_where_that_is_declared():
    """Read once; then the store fails, and each read is to be a new one: bakery's slot is still 1, its row 5 ms old."""

    class Failing:
        fails = False

        def read(self, entities, now_ms):
            if self.fails:
                raise Unavailable("down")
            return MemoryReader(KNOWN).read(entities, now_ms)

    store = Failing()
    reader = CachedReader(store, width=1, reread_s=0, max_age_s=60)
    served = deployment().model_copy(update={"serving": Serving(unavailable="cached")})
    telemetry = Telemetry()

    async def scenario(made):
        assert list((await made.ask(served, rows("bakery"))).fallback) == ["none"]
        store.fails = True
        answers = await made.ask(served, rows("bakery"))
        assert (list(answers.status), list(answers.fallback)) == (["unavailable"], ["cached"])
        assert (answers.prediction.tolist(), answers.feature_age_ms.tolist()) == ([2.0], [5])
        with pytest.raises(Unavailable):
            await made.ask(deployment(), rows("bakery"))

    run(scenario, direct(open_reader=lambda _: reader, telemetry=telemetry))
    counted = {"model": "shop", "version": "1", "kind": "cached"}
    assert telemetry.registry.get_sample_value("hybrid_fallbacks_total", counted) == 1


def test_no_answer_in_time_is_unavailable_and_what_nobody_waits_for_is_not_merged():
    """The second request's caller gave up while the first was merged: its row never reaches the models."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        with pytest.raises(Unavailable, match="no answer in time"):
            await made.ask(deployment(), rows("kiosk"))
        models.go.set()
        with pytest.raises(Unavailable, match="no answer in time"):
            await first
        while made._merging is not None and not made._merging.done():
            await made._merging
        assert [n for name, _, n in models.calls if name == "shop_head"] == [1]

    run(scenario, direct(models, Limits(deadline_s=0.05)))


def test_a_row_past_its_callers_deadline_is_not_merged():
    """Asked at 1,000 ms by a caller of 20 s, looked at 20,001 ms later: no network computes it."""
    models, clock = SumModels(), iter([1_000, 21_001])

    async def scenario(made):
        with pytest.raises(Unavailable, match="row 1 of 1"):
            await made.ask(deployment(), rows("bakery"), 20)
        assert models.calls == []

    run(scenario, direct(models, now_ms=lambda: next(clock)))


def test_triton_has_as_long_as_the_most_patient_caller_of_a_batch_waits():
    """The first row's caller waits 9 s, alone; of the two that come meanwhile, one waits 20 s; the limit is 30 s."""
    models, before_s = Halting(), time.monotonic()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery"), 9))
        await asyncio.to_thread(models.reached.wait, 30)
        others = [asyncio.create_task(made.ask(deployment(), rows("kiosk"), timeout_s)) for timeout_s in (10, 20)]
        await asyncio.sleep(0)
        models.go.set()
        await asyncio.gather(first, *others)

    run(scenario, direct(models))
    took_s = time.monotonic() - before_s
    for until_s, left_s in zip(models.until_s, (9, 9, 20, 20), strict=True):
        assert left_s <= until_s - before_s <= left_s + took_s


def test_rows_beyond_the_limit_are_refused_until_others_are_answered():
    """With room for two rows, a third is told at once."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery", "kiosk")))
        await asyncio.to_thread(models.reached.wait, 30)
        with pytest.raises(Overloaded, match="too many rows"):
            await made.ask(deployment(), rows("kiosk"))
        models.go.set()
        await first
        assert (await made.ask(deployment(), rows("kiosk"))).prediction.tolist() == [4.0]

    run(scenario, direct(models, Limits(deadline_s=30, waiting_rows=2)))


def test_what_is_declared_for_it_is_opened_and_tried_before_it_is_asked():
    """Not what goes over Kafka: that is the worker's."""
    opened, models = [], SumModels()

    def open_reader(served):
        opened.append((served.model, served.version))
        return MemoryReader(KNOWN)

    async def scenario(made):
        assert not made.ready
        await made.prepare([DIRECT, deployment(2)])
        assert (made.ready, opened) == (True, [("shop", 1)])
        assert [name for name, *_ in models.calls] == ["shop_server_tower", "shop_head"]

    run(scenario, direct(models, open_reader=open_reader))


def test_a_store_that_cannot_be_opened_makes_its_rows_unavailable():
    """It is opened again with the next request."""

    def closed(_):
        raise ConfigError("no such view")

    async def scenario(made):
        await made.prepare([DIRECT, deployment()])
        assert made.ready
        with pytest.raises(Unavailable, match="feature store"):
            await made.ask(deployment(), rows("bakery"))

    run(scenario, direct(open_reader=closed))


def test_an_end_while_requests_wait_tells_them():
    """None is left without an answer."""
    models = Halting()

    async def scenario(made):
        first = asyncio.create_task(made.ask(deployment(), rows("bakery")))
        await asyncio.to_thread(models.reached.wait, 30)
        second = asyncio.create_task(made.ask(deployment(), rows("kiosk")))
        await asyncio.sleep(0)
        made._thread.shutdown(wait=False)  # as `close` begins, which then waits for the first
        models.go.set()
        assert (await first).prediction.tolist() == [2.0]
        with pytest.raises(Unavailable, match="stopping"):
            await second

    run(scenario, direct(models))
