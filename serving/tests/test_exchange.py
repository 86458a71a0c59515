import asyncio
from dataclasses import replace

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider

from hybrid.errors import Overloaded, StaleFeatures, Unavailable, UnknownEntity
from hybrid.messages import Predictions
from hybrid.tracing import Tracer
from serving import exchange
from serving.exchange import Exchange, Limits
from serving.oip import Rows
from serving.telemetry import Telemetry, current_traceparent
from serving.testing import deployment

PATIENT = Limits(deadline_s=30, record_rows=100)


def rows(*entities, size=2):
    n = len(entities)
    return Rows(np.array(entities, dtype=object), np.zeros((n, 2), np.float32), np.ones((n, size), np.float32))


class Broker:
    """Keeps what is sent; answers when told to."""

    def __init__(self, limits=PATIENT):
        self.sent, self.arrived, self.traces = asyncio.Queue(), 0, []
        self.exchange = Exchange(self.send, 3, lambda: 1_000, limits)
        self.exchange.start()

    def send(self, message, traces, on_failure):
        self.traces.append(traces)
        self.sent.put_nowait((message, on_failure))

    def answer(self, message, status="ok", picked=slice(None), fallback="none"):
        ids = message.request_id[picked]
        n, prediction = len(ids), np.array([len(e) / 8 for e in message.entity[picked]], np.float32)
        words = {"status": np.array([status] * n, dtype=object), "fallback": np.array([fallback] * n, dtype=object)}
        answer = Predictions("shop", 1, 3, ids, prediction=prediction, feature_age_ms=np.full(n, 9), **words)
        self.exchange.answer(answer)

    def ask(self, *entities, **changes):
        return asyncio.create_task(self.exchange.ask(deployment(), rows(*entities, **changes)))


def test_requests_that_wait_at_the_same_time_leave_as_one_record():
    """Three callers, four rows, one record of gateway 3; each caller gets its own rows back."""

    async def scenario():
        broker = Broker()
        asked = [broker.ask("a"), broker.ask("bb", "ccc"), broker.ask("dddd")]
        message, _ = await broker.sent.get()
        broker.answer(message)
        assert (len(message), message.reply_partition, message.event_ms.tolist()) == (4, 3, [1_000] * 4)
        assert [a.prediction.tolist() for a in await asyncio.gather(*asked)] == [[1 / 8], [2 / 8, 3 / 8], [4 / 8]]
        assert broker.sent.empty()

    asyncio.run(scenario())


def test_what_comes_while_a_record_is_unanswered_leaves_together_with_its_answer(monkeypatch):
    """The first caller waits for nobody; the two that come then go as one record, once it is answered."""
    monkeypatch.setattr(exchange, "LINGER_S", 60)

    async def scenario():
        broker = Broker()
        asked = [broker.ask("a")]
        first, _ = await broker.sent.get()
        asked += [broker.ask("bb"), broker.ask("ccc")]
        while broker.exchange.queued < 2:
            await asyncio.sleep(0)
        assert broker.sent.empty()
        broker.answer(first)
        together, _ = await broker.sent.get()
        assert together.entity.tolist() == ["bb", "ccc"]
        broker.answer(together)
        assert [a.prediction.tolist() for a in await asyncio.gather(*asked)] == [[1 / 8], [2 / 8], [3 / 8]]

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["refused", "cancelled"])
def test_a_record_that_nobody_waits_for_any_more_keeps_nobody_waiting(monkeypatch, end):
    """Kafka did not take it, or its caller has gone: the next leaves."""
    monkeypatch.setattr(exchange, "LINGER_S", 60)

    async def scenario():
        broker = Broker()
        given_up = broker.ask("a")
        _, on_failure = await broker.sent.get()
        asked = broker.ask("bb")
        while not broker.exchange.queued:
            await asyncio.sleep(0)
        if end == "cancelled":
            given_up.cancel()
        else:
            await asyncio.to_thread(on_failure)
        broker.answer((await broker.sent.get())[0])
        assert (await asked).prediction.tolist() == [2 / 8]
        with pytest.raises((Unavailable, asyncio.CancelledError)):
            await given_up

    asyncio.run(scenario())


def test_where_no_answer_comes_a_request_leaves_all_the_same():
    """A worker that died owes answers; a request that comes then must reach its successor in time."""

    async def scenario():
        broker = Broker()
        lost = broker.ask("a")
        await broker.sent.get()
        asked = broker.ask("bb")
        broker.answer((await asyncio.wait_for(broker.sent.get(), 5))[0])
        assert (await asked).prediction.tolist() == [2 / 8]
        lost.cancel()

    asyncio.run(scenario())


def test_a_full_record_leaves_at_once_and_a_large_question_as_several():
    """At 2 rows a record, 5 rows leave as 2 + 2 + 1 and are answered together."""

    async def scenario():
        broker = Broker(Limits(deadline_s=30, record_rows=2))
        asked = broker.ask("a", "b", "c", "d", "e")
        messages = [(await broker.sent.get())[0] for _ in range(3)]
        assert [len(message) for message in messages] == [2, 2, 1]
        for message in reversed(messages):
            assert not asked.done()
            broker.answer(message)
        assert len((await asked).prediction) == 5

    asyncio.run(scenario())


def test_no_record_is_larger_than_kafka_takes():
    """An embedding of 65,536 floats is 256 KiB: at most two rows fit below 768 KiB with the rest."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a", "b", "c", "d", size=2)
        asked.cancel()
        wide = deployment().model_copy(update={"device_embedding": 1 << 16})
        task = asyncio.create_task(broker.exchange.ask(wide, rows("a", "b", "c", "d", size=1 << 16)))
        sizes = [len((await broker.sent.get())[0].to_bytes()) for _ in range(2)]
        task.cancel()
        assert max(sizes) < 1 << 20

    asyncio.run(scenario())


def test_a_repeated_or_unknown_answer_is_dropped():
    """Kafka delivers at least once: the second copy, and an answer to nobody, change nothing."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a", "bb")
        message, _ = await broker.sent.get()
        broker.answer(message, picked=slice(0, 1))
        broker.answer(message, "unavailable", picked=slice(0, 1))
        assert not asked.done()
        broker.answer(message, picked=slice(1, 2))
        broker.answer(message)
        assert (await asked).prediction.tolist() == [1 / 8, 2 / 8]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "forged",
    [
        {"prediction": 42.5},
        {"prediction": np.nan},
        {"prediction": -0.1},
        {"model": "other"},
        {"version": 77},
        {"fallback": "magic"},
        {"status": "stale_features", "fallback": "constant", "prediction": np.nan},
    ],
)
def test_an_answer_that_no_worker_can_have_given_is_dropped(forged):
    """It is no probability, or of another model or version than was asked; the true one, which comes later, counts."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a")
        message, _ = await broker.sent.get()
        said = {"model": "shop", "version": 1, "prediction": 0.5, "status": "ok", "fallback": "none"} | forged
        columns = {word: np.array([said[word]], dtype=object) for word in ("status", "fallback")}
        columns["feature_age_ms"] = np.array([9])
        columns["prediction"] = np.array([said["prediction"]], np.float32)
        broker.exchange.answer(Predictions(said["model"], said["version"], 3, message.request_id, **columns))
        assert not asked.done()
        broker.answer(message)
        assert (await asked).prediction.tolist() == [1 / 8]

    asyncio.run(scenario())


def test_no_answer_in_time_is_unavailable_and_a_late_one_is_dropped():
    """The deadline passes; the answer that then comes finds nobody."""

    async def scenario():
        broker = Broker(Limits(deadline_s=0.01))
        with pytest.raises(Unavailable, match="no answer in time"):
            await broker.ask("a")
        message, _ = await broker.sent.get()
        broker.answer(message)
        assert not broker.exchange._asked

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "error"),
    [("unknown_entity", UnknownEntity), ("stale_features", StaleFeatures), ("a word of a later worker", Unavailable)],
)
def test_a_row_that_cannot_be_predicted_raises_its_error(status, error):
    """The first such row says why, by its place and without its entity."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a", "bb")
        message, _ = await broker.sent.get()
        broker.answer(message, picked=slice(0, 1))
        broker.answer(message, status, picked=slice(1, 2))
        with pytest.raises(error, match=r"^row 2 of 2: [^b]") as raised:
            await asked
        assert type(raised.value) is error

    asyncio.run(scenario())


def test_a_row_that_a_fallback_answers_is_an_answer():
    """It says what was missing and what answered."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a", "bb")
        message, _ = await broker.sent.get()
        broker.answer(message, picked=slice(0, 1))
        broker.answer(message, "stale_features", picked=slice(1, 2), fallback="device-only")
        answers = await asked
        assert (answers.status, answers.fallback) == (["ok", "stale_features"], ["none", "device-only"])
        assert answers.prediction.tolist() == [1 / 8, 2 / 8]

    asyncio.run(scenario())


def test_a_record_that_kafka_did_not_take_fails_its_requests_at_once():
    """The failure comes from Kafka's thread; nobody waits for the deadline."""

    async def scenario():
        broker = Broker()
        asked = [broker.ask("a"), broker.ask("b")]
        _, on_failure = await broker.sent.get()
        await asyncio.to_thread(on_failure)
        for each in asked:
            with pytest.raises(Unavailable, match="Kafka did not take"):
                await each

    asyncio.run(scenario())


def test_rows_beyond_the_limit_are_refused_until_others_are_answered():
    """With room for two rows, a third waits for nothing: it is told at once."""

    async def scenario():
        broker = Broker(Limits(deadline_s=30, waiting_rows=2))
        asked = broker.ask("a", "b")
        message, _ = await broker.sent.get()
        with pytest.raises(Overloaded, match="too many rows"):
            await broker.ask("c")
        broker.answer(message)
        await asked
        last = broker.ask("c")
        broker.answer((await broker.sent.get())[0])
        assert (await last).prediction.tolist() == [1 / 8]

    asyncio.run(scenario())


def test_no_more_bytes_wait_than_may(tmp_path):
    """A row is 2 + 2 floats, 16 bytes: of 40, two rows fit and a third does not, until one of them is answered."""

    async def scenario():
        broker = Broker(Limits(deadline_s=30, waiting_bytes=40))
        asked = [broker.ask("a"), broker.ask("b")]
        first, _ = await broker.sent.get()
        with pytest.raises(Overloaded):
            await broker.ask("c")
        broker.answer(first)
        await asked[0]
        again = broker.ask("c")
        while not all(task.done() for task in (*asked, again)):
            broker.answer((await broker.sent.get())[0])
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_the_caller_may_wait_less_than_the_limit_but_not_longer():
    """A caller of 10 ms is told so at a limit of a minute; one of a minute at a limit of 10 ms."""

    async def scenario():
        for limit_s, timeout_s in ((60, 0.01), (0.01, 60)):
            broker = Broker(Limits(deadline_s=limit_s))
            with pytest.raises(Unavailable, match=r"no answer in time \(0.01 s\)"):
                await broker.exchange.ask(deployment(), rows("a"), timeout_s)

    asyncio.run(scenario())


def test_a_record_says_how_long_each_caller_waits():
    """Asked at 1,000 ms with 30 s: who says nothing, 300 ms, 100 us and an hour; a millisecond begun is a whole one."""

    async def scenario():
        broker = Broker()
        asked = [
            asyncio.create_task(broker.exchange.ask(deployment(), rows(*entities), timeout_s))
            for entities, timeout_s in (("a", None), ("bc", 0.3), ("d", 0.0001), ("e", 3_600))
        ]
        message, _ = await broker.sent.get()
        assert message.event_ms.tolist() == [1_000] * 5
        assert message.deadline_ms.tolist() == [31_000, 1_300, 1_300, 1_001, 31_000]
        broker.answer(message)
        await asyncio.gather(*asked, return_exceptions=True)  # who waits 100 us may have gone

    asyncio.run(scenario())


def test_a_record_carries_the_contexts_of_the_traced_requests_in_it():
    """Of three requests two are traced; at 3 rows a record, the second of them lies in both records."""

    async def scenario():
        broker, telemetry = Broker(replace(PATIENT, record_rows=3)), Telemetry(Tracer(TracerProvider()))
        contexts = []

        async def ask(*entities):
            with telemetry.request(None):
                contexts.append(current_traceparent())
                await broker.exchange.ask(deployment(), rows(*entities))

        asked = [broker.ask("untraced"), *(asyncio.create_task(ask(*entities)) for entities in ("a", "bcd"))]
        messages = [(await broker.sent.get())[0] for _ in range(2)]
        assert [message.entity.tolist() for message in messages] == [["untraced", "a", "b"], ["c", "d"]]
        assert broker.traces == [contexts, contexts[1:]]
        for message in messages:
            broker.answer(message)
        await asyncio.gather(*asked)

    asyncio.run(scenario())


def test_what_waits_is_counted():
    """Three rows wait for company, then for an answer, then for nothing."""

    async def scenario():
        broker = Broker()
        asked = broker.ask("a", "b", "c")
        await asyncio.sleep(0)
        assert (broker.exchange.queued, broker.exchange.in_flight) == (3, 3)
        message, _ = await broker.sent.get()
        assert (broker.exchange.queued, broker.exchange.in_flight) == (0, 3)
        broker.answer(message)
        await asked
        assert broker.exchange.in_flight == 0

    asyncio.run(scenario())


def wanting(*entities):
    return replace(rows(*entities), contribution=2)


def answered_with(message, **said):
    """An answer to the first row of a record."""
    said = {"status": "ok", "fallback": "none", "prediction": 0.5, "server": [[1.0, 2.0]], "slots": []} | said
    words = {word: np.array([said[word]], dtype=object) for word in ("status", "fallback")}
    numbers = {"prediction": np.array([said["prediction"]], np.float32), "feature_age_ms": np.array([9])}
    numbers |= {"expires_ms": np.array([77]), "server_embedding": np.array(said["server"], np.float32).reshape(1, -1)}
    numbers |= {"server_slots": np.array(said["slots"], np.float32).reshape(1, -1)}
    return Predictions("shop", 1, 3, message.request_id[:1], **words, **numbers)


def test_who_wants_the_contribution_is_given_it_and_who_shares_its_record_is_not():
    """One record of two questions says which row wants it; the answer's columns find their callers."""

    async def scenario():
        broker = Broker()
        asked = [broker.ask("a"), asyncio.create_task(broker.exchange.ask(deployment(), wanting("bb")))]
        message, _ = await broker.sent.get()
        assert message.wants_server.tolist() == [False, True]
        both = answered_with(message)
        broker.exchange.answer(replace(both, server_embedding=np.full((1, 2), np.nan, np.float32)))
        broker.exchange.answer(replace(both, request_id=message.request_id[1:]))
        without, given = await asyncio.gather(*asked)
        assert without.server_embedding.shape == (1, 0)
        assert (given.server_embedding.tolist(), given.expires_ms.tolist()) == ([[1.0, 2.0]], [77])

    asyncio.run(scenario())


def test_who_wants_slots_is_given_them_and_who_shares_its_record_is_not():
    """One record says which row wants them; NaN in them is a missing value."""

    async def scenario():
        broker = Broker()
        wish = replace(rows("bb"), slots=3)
        asked = [broker.ask("a"), asyncio.create_task(broker.exchange.ask(deployment(), wish))]
        message, _ = await broker.sent.get()
        assert (message.wants_slots.tolist(), message.wants_server.tolist()) == ([False, True], [False, False])
        said = answered_with(message, server=[], slots=[1.0, np.nan, 3.0])
        broker.exchange.answer(said)
        broker.exchange.answer(replace(said, request_id=message.request_id[1:]))
        without, given = await asyncio.gather(*asked)
        assert without.server_slots.shape == (1, 0)
        np.testing.assert_array_equal(given.server_slots, [[1, np.nan, 3]])

    asyncio.run(scenario())


@pytest.mark.parametrize("slots", [[], [1.0, 2.0], [1.0, 2.0, np.inf]])
def test_slots_that_no_worker_can_have_given_are_dropped(slots):
    """None, as a worker of the release before, another width, infinite: the true answer, which comes later, counts."""

    async def scenario():
        broker = Broker()
        asked = asyncio.create_task(broker.exchange.ask(deployment(), replace(rows("a"), slots=3)))
        message, _ = await broker.sent.get()
        broker.exchange.answer(answered_with(message, slots=slots))
        await asyncio.sleep(0)
        assert not asked.done()
        broker.exchange.answer(answered_with(message, slots=[1.0, 2.0, 3.0]))
        assert (await asked).server_slots.tolist() == [[1.0, 2.0, 3.0]]

    asyncio.run(scenario())


@pytest.mark.parametrize("server", [[], [1.0], [1.0, 2.0, 3.0], [1.0, np.nan], [np.inf, 1.0]])
@pytest.mark.parametrize("merge", ["server", "device"])
def test_a_server_embedding_that_no_worker_can_have_given_is_dropped(merge, server):
    """Of another width, or not finite: the true one, which comes later, counts."""

    async def scenario():
        broker, served = Broker(), deployment().model_copy(update={"merge": merge})
        asked = asyncio.create_task(broker.exchange.ask(served, wanting("a")))
        message, _ = await broker.sent.get()
        broker.exchange.answer(answered_with(message, server=server))
        await asyncio.sleep(0)
        assert not asked.done()
        broker.exchange.answer(answered_with(message))
        assert (await asked).server_embedding.tolist() == [[1.0, 2.0]]

    asyncio.run(scenario())


def test_a_device_that_merges_needs_no_prediction_and_of_a_constant_no_embedding():
    """NaN in both is an answer where the fallback says "constant"; an error row may have no column at all."""

    async def scenario():
        broker, served = Broker(), deployment().model_copy(update={"merge": "device"})
        for said, error in (
            ({"prediction": np.nan}, None),
            ({"prediction": np.nan, "status": "unavailable", "fallback": "constant", "server": [[np.nan] * 2]}, None),
            ({"prediction": np.nan, "status": "unknown_entity", "server": []}, UnknownEntity),
        ):
            asked = asyncio.create_task(broker.exchange.ask(served, wanting("a")))
            message, _ = await broker.sent.get()
            broker.exchange.answer(answered_with(message, **said))
            if error is None:
                assert (await asked).fallback == [said.get("fallback", "none")]
            else:
                with pytest.raises(error):
                    await asked

    asyncio.run(scenario())


def test_room_is_taken_for_what_comes_back_too():
    """A row is 16 bytes of numbers and asks for 8 back: two such rows do not fit into 40."""

    async def scenario():
        broker = Broker(Limits(deadline_s=30, waiting_bytes=40))
        with pytest.raises(Overloaded):
            await broker.exchange.ask(deployment(), wanting("a", "b"))
        asked = broker.ask("a", "b")
        broker.answer((await broker.sent.get())[0])
        await asked

    asyncio.run(scenario())
