import threading

import numpy as np
import pytest

from hybrid.errors import ConfigError, Unavailable
from hybrid.messages import DeadLetter, DeviceEmbeddings, Predictions
from serving import worker as worker_module
from serving.deployments import Deployments
from serving.health import Health
from serving.telemetry import Telemetry
from serving.testing import MemoryReader, MemoryTopic, SumModels, deployment
from serving.worker import REFRESH_MS, Pace, Worker


class Setup:
    """A worker between two topics in memory; `now_ms` is set by the test."""

    def __init__(self, folder, in_flight=1):
        self.folder, self.now_ms, self.opened = folder, 0, []
        deployment().write(folder)
        self.telemetry = Telemetry()
        self.inbox, self.outbox, self.models = MemoryTopic(), MemoryTopic(), SumModels()
        self.worker = Worker(
            inbox=self.inbox,
            outbox=self.outbox,
            deployments=Deployments(folder),
            open_reader=self.open,
            models=self.models,
            now_ms=lambda: self.now_ms,
            in_flight=in_flight,
            telemetry=self.telemetry,
        )

    def count(self, name, **labels):
        return self.telemetry.registry.get_sample_value(f"hybrid_{name}", labels)

    def open(self, asked):
        self.opened.append(asked.version)
        return MemoryReader({"bakery": (1.0, "ok")})

    def put(self, value):
        self.inbox.send(DeviceEmbeddings.TOPIC, value)
        self.inbox.flush()

    def ask(self, number, version=1):
        message = DeviceEmbeddings(
            "shop",
            version,
            reply_partition=2,
            request_id=np.frombuffer(number.to_bytes(16, "big"), dtype="V16"),
            entity=np.array(["bakery"], dtype=object),
            request=np.zeros((1, 2), np.float32),
            embedding=np.zeros((1, 2), np.float32),
            event_ms=np.array([self.now_ms]),
        )
        self.put(message.to_bytes())

    @property
    def answered(self):
        messages = [Predictions.from_bytes(r.value) for r in self.outbox.records if r.topic == Predictions.TOPIC]
        return [
            (int.from_bytes(i.tobytes(), "big"), s)
            for m in messages
            for i, s in zip(m.request_id, m.status, strict=True)
        ]


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


def test_offsets_are_committed_once_the_answers_lie_in_kafka(setup):
    """Two requests, two answers to partition 2, and nothing left to do."""
    setup.ask(1)
    setup.ask(2)
    setup.worker.step()
    assert setup.answered == [(1, "ok"), (2, "ok")]
    assert {record.partition for record in setup.outbox.records} == {2}
    assert setup.inbox.committed == 2


def test_answers_that_kafka_did_not_take_are_given_again(setup):
    """The flush fails once: no commit; the next step starts from the last one and answers the same row."""
    setup.outbox.failures = 1
    setup.ask(1)
    with pytest.raises(Unavailable):
        setup.worker.step()
    assert (setup.answered, setup.inbox.committed) == ([], 0)
    setup.worker.step()
    assert (setup.answered, setup.inbox.committed) == ([(1, "ok")], 1)


def test_a_worker_that_dies_before_its_commit_is_followed_by_one_that_answers(setup):
    """A redelivery is answered twice with the same id: the gateway drops the second."""
    setup.ask(1)
    setup.worker.step()
    setup.inbox.committed = 0
    setup.inbox.rewind()
    setup.worker.step()
    assert setup.answered == [(1, "ok"), (1, "ok")]


def test_rows_whose_callers_gave_up_are_told_so_without_a_forward_pass(setup):
    """After an outage: a row asked 5,001 ms ago costs nothing, one of 5,000 ms ago is predicted."""
    setup.ask(1)
    setup.now_ms = 1
    setup.ask(2)
    setup.now_ms = 5_001
    setup.worker.step()
    assert setup.answered == [(1, "unavailable"), (2, "ok")]
    assert setup.models.calls == [("shop_server_tower", 1, 1), ("shop_head", 1, 1)]
    assert setup.inbox.committed == 2


def test_garbage_goes_to_the_dead_letters_and_the_loop_goes_on(setup):
    """The requests before and after it are answered; the letter holds none of its bytes."""
    setup.ask(1)
    setup.put(b"secret garbage")
    setup.ask(2)
    setup.worker.step()
    assert setup.answered == [(1, "ok"), (2, "ok")]
    (letter,) = [r for r in setup.outbox.records if r.topic == "hybrid.device-embeddings.v1.dead"]
    assert b"secret" not in letter.value
    assert DeadLetter.model_validate_json(letter.value).offset == 1
    assert setup.inbox.committed == 3


def narrow(n, model):
    """A record of a model that is not served, whose rows take 36 bytes; each refusal takes 45."""
    return DeviceEmbeddings(
        model,
        9,
        reply_partition=2,
        request_id=np.arange(2 * n, dtype=np.int64).view("V16"),
        entity=np.full(n, "", dtype=object),
        request=np.zeros((n, 0), np.float32),
        embedding=np.zeros((n, 0), np.float32),
        event_ms=np.zeros(n, np.int64),
    ).to_bytes()


def test_refusals_of_many_narrow_rows_stay_below_kafkas_limit(setup):
    """27,000 rows are a record of 976 kB; their refusals, 1.22 MB, leave in several."""
    setup.put(narrow(27_000, "shop"))
    setup.worker.step()
    assert len({number for number, _ in setup.answered}) == 27_000
    assert {status for _, status in setup.answered} == {"unknown_model"}
    assert setup.inbox.committed == 1


class WideModels(SumModels):
    """A tower of 1,024 numbers."""

    def infer(self, *arguments):
        return np.repeat(super().infer(*arguments)[:, :1], 1_024, axis=1)


def test_wide_server_embeddings_stay_below_kafkas_limit(setup):
    """300 rows of a device that merges are a small record; their embeddings, 1.2 MB, leave in several."""
    served = deployment().model_copy(update={"merge": "device", "server_embedding": 1_024})
    served.write(setup.folder)
    setup.now_ms, setup.worker._models = 2 * REFRESH_MS, WideModels()
    asked = DeviceEmbeddings(
        "shop",
        1,
        reply_partition=2,
        request_id=np.arange(600, dtype=np.int64).view("V16"),
        entity=np.full(300, "bakery", dtype=object),
        request=np.zeros((300, 2), np.float32),
        embedding=np.zeros((300, 0), np.float32),
        event_ms=np.full(300, setup.now_ms),
    )
    setup.put(asked.to_bytes())
    setup.worker.step()
    assert len({number for number, status in setup.answered if status == "ok"}) == 300
    assert len(setup.outbox.records) > 1


def test_a_record_whose_answer_would_be_too_large_is_a_dead_letter(setup):
    """A name of 1 MB, which each answer repeats, fits beside 1,200 rows but not beside their refusals."""
    setup.put(narrow(1_200, "x" * 1_000_000))
    setup.ask(2)
    setup.worker.step()
    assert setup.answered == [(2, "ok")]
    (letter,) = [r for r in setup.outbox.records if r.topic == "hybrid.device-embeddings.v1.dead"]
    assert DeadLetter.model_validate_json(letter.value).reason == "the model's name must have at most 256 bytes"
    assert setup.inbox.committed == 2


def test_small_records_polled_together_take_one_forward_pass(setup):
    """Three records are one call of the tower and one of the head, three rows each."""
    for number in range(3):
        setup.ask(number)
    setup.worker.step()
    assert setup.models.calls == [("shop_server_tower", 1, 3), ("shop_head", 1, 3)]


def test_a_promotion_is_taken_up_and_rows_of_the_version_before_are_still_answered(setup):
    """After version 2 replaced version 1, rows of both that were on their way are predicted by their own."""
    setup.ask(1)
    deployment(version=2).write(setup.folder)
    setup.ask(2, version=2)
    setup.worker.step()
    assert sorted(setup.answered) == [(1, "ok"), (2, "ok")]
    assert {(model, version) for model, version, _ in setup.models.calls if model == "shop_head"} == {
        ("shop_head", 1),
        ("shop_head", 2),
    }


def test_the_feature_store_is_opened_once_per_version_and_ahead_of_its_requests(setup):
    """At the next refresh, a second after the start, version 2 is opened before anybody asks."""
    setup.ask(1)
    setup.worker.step()
    setup.worker.step()
    deployment(version=2).write(setup.folder)
    setup.now_ms = REFRESH_MS
    setup.worker.step()
    assert setup.opened == [1, 2]


def test_it_announces_itself_once_it_is_ready_and_ends_between_two_polls(setup):
    """`ready` is asked after each step until it is true, then never again; `stopping` ends the loop."""
    stopping, answers, announced = threading.Event(), iter([False, True]), []

    def announce():
        announced.append(setup.answered)
        stopping.set()

    setup.ask(1)
    setup.worker.run(stopping, lambda: next(answers), announce)
    assert announced == [[(1, "ok")]]


def test_a_view_that_is_not_there_yet_does_not_stop_the_worker(setup):
    """Its rows are unavailable; a reader that opens later answers."""
    opened = setup.worker._readers._open

    def closed(_):
        raise ConfigError("no such view")

    setup.worker._readers._open = closed
    setup.ask(1)
    setup.worker.step()
    setup.worker._readers._open = opened
    setup.ask(2)
    setup.worker.step()
    assert setup.answered == [(1, "unavailable"), (2, "ok")]


def test_a_view_that_is_missing_is_logged_once_until_something_changes(setup, caplog):
    """Three refreshes say so once; another reason, or the same one after a success, is said again."""
    opened, reasons = setup.worker._readers._open, ["no view", "no view", "no view", "no folder", None, "no view"]

    def reader(asked):
        if reason := reasons[setup.now_ms // REFRESH_MS - 1]:
            raise ConfigError(reason)
        return opened(asked)

    setup.worker._readers._open = reader
    for _ in reasons:
        setup.now_ms += REFRESH_MS
        setup.worker._readers._opened.clear()
        setup.worker.step()
    said = [record.getMessage() for record in caplog.records if "cannot be predicted" in record.getMessage()]
    assert said == [
        f"model shop version 1 cannot be predicted yet: {reason}" for reason in ("no view", "no folder", "no view")
    ]


@pytest.fixture
def gated(tmp_path):
    """Two batches may be on their way, of one record each; Triton answers row n's batch once gate n is open."""
    setup = Setup(tmp_path, in_flight=2)
    setup.worker._pace = Pace(least_bytes=1, most_bytes=1)
    setup.gates = [threading.Event() for _ in range(4)]
    infer = setup.models.infer

    def gate(model, version, inputs, output, until_s):
        if output == "prediction":
            assert setup.gates[int(inputs["device"][0, 0])].wait(10)
        return infer(model, version, inputs, output, until_s)

    setup.models.infer = gate
    yield setup
    for each in setup.gates:
        each.set()
    setup.worker._threads.shutdown()


def ask_gate(setup, number):
    message = DeviceEmbeddings(
        "shop",
        1,
        reply_partition=2,
        request_id=np.frombuffer(number.to_bytes(16, "big"), dtype="V16"),
        entity=np.array(["bakery"], dtype=object),
        request=np.zeros((1, 2), np.float32),
        embedding=np.full((1, 2), number, np.float32),
        event_ms=np.array([0]),
    )
    setup.put(message.to_bytes())


def answered(setup, *numbers):
    """Waits until those have been answered, in any order."""
    deadline = threading.Event()
    for _ in range(1000):
        if {number for number, _ in setup.answered} >= set(numbers):
            return
        deadline.wait(0.01)
    raise AssertionError(setup.answered)


def test_a_later_batch_may_be_answered_first_but_offsets_wait_for_the_earlier(gated):
    """Batch 1 is answered while batch 0 waits for Triton: nothing is committed; then both are at once."""
    for number in (0, 1):
        ask_gate(gated, number)
    gated.gates[1].set()
    gated.worker.step()
    gated.worker._take(0)
    answered(gated, 1)
    gated.worker._land(most=2)
    assert (gated.answered, gated.inbox.committed) == ([(1, "ok")], 0)
    gated.gates[0].set()
    gated.worker._land(most=0)
    assert (sorted(gated.answered), gated.inbox.committed) == ([(0, "ok"), (1, "ok")], 2)


def test_no_more_batches_are_taken_than_may_be_on_their_way(gated, monkeypatch):
    """With two waiting for Triton the share is paused and polled, record 2 stays in Kafka; then it is taken."""
    monkeypatch.setattr(worker_module, "STALLED_S", 0.01)
    paused = threading.Event()
    pause = gated.inbox.pause
    gated.inbox.pause = lambda: (pause(), paused.set())
    for number in range(3):
        ask_gate(gated, number)
    gated.worker.step()
    stepping = threading.Thread(target=gated.worker.step)
    stepping.start()
    assert paused.wait(10)
    assert (gated.inbox.position, gated.inbox.paused) == (2, True)
    gated.gates[0].set()
    stepping.join(10)
    assert (gated.inbox.paused, gated.inbox.committed) == (False, 1)
    for gate in gated.gates:
        gate.set()
    gated.worker.step()
    gated.worker._land(most=0)
    assert (sorted(gated.answered), gated.inbox.committed) == ([(n, "ok") for n in range(3)], 3)


def test_batches_after_one_that_kafka_did_not_take_are_answered_again(gated):
    """Batch 0's answers are lost: although batch 1's arrived, both come again, and nothing was committed."""
    for number in (0, 1):
        ask_gate(gated, number)
    gated.gates[1].set()
    gated.worker.step()
    gated.worker._take(0)
    answered(gated, 1)
    gated.outbox.failures = 1
    gated.gates[0].set()
    with pytest.raises(Unavailable):
        gated.worker._land(most=0)
    assert gated.inbox.committed == 0
    gated.worker.step()
    gated.worker.step()
    gated.worker._land(most=0)
    assert (sorted(gated.answered), gated.inbox.committed) == ([(0, "ok"), (1, "ok"), (1, "ok")], 2)


def test_a_worker_that_is_told_to_stop_finishes_what_it_has_taken(gated):
    """Its two batches are answered and committed; the third record is the next worker's."""
    for number in range(3):
        ask_gate(gated, number)
    gated.gates[0].set()
    stopping = threading.Event()
    step, taken = gated.worker.step, []

    def two_steps():
        step()
        taken.append(gated.inbox.position)
        if len(taken) == 2:
            stopping.set()
            gated.gates[1].set()

    gated.worker.step = two_steps
    gated.worker.run(stopping, lambda: False, lambda: None)
    assert taken == [1, 2]
    assert (sorted(gated.answered), gated.inbox.committed) == ([(0, "ok"), (1, "ok")], 2)


def test_a_batch_grows_while_it_is_quick_and_full_and_shrinks_when_it_is_slow():
    """Records of 100 bytes, steps of 1,000: 10, 20, 30 fit 0.1 s; one of 0.2 s takes a tenth off."""
    pace = Pace(0.1, least_bytes=1_000, most_bytes=3_000)
    pace._record_bytes = 100.0
    sizes = [pace.records]
    for seconds in (0.05, 0.05, 0.05, 0.2, 0.2):
        pace.took(pace.records, 100 * pace.records, seconds)
        sizes.append(pace.records)
    assert sizes == [10, 20, 30, 30, 27, 24]


def test_a_batch_that_was_not_full_says_nothing_of_larger_ones():
    """Three records came, quickly: the next batch may still take ten."""
    pace = Pace(0.1, least_bytes=1_000, most_bytes=3_000)
    pace._record_bytes = 100.0
    pace.took(3, 300, 0.01)
    assert pace.records == 10


def test_slow_batches_do_not_shrink_to_nothing():
    """However slow, 1,000 bytes of 100-byte records are ten, and one of 5 kB is one."""
    pace = Pace(0.1, least_bytes=1_000, most_bytes=3_000)
    pace._record_bytes = 100.0
    for _ in range(50):
        pace.took(10, 1_000, 1.0)
    assert pace.records == 10
    for _ in range(50):
        pace.took(1, 5_000, 1.0)
    assert pace.records == 1


def test_a_step_is_counted(setup):
    """Of three records two are read, as one batch of two rows; the third is a dead letter."""
    setup.ask(1)
    setup.put(b"garbage")
    setup.ask(2)
    setup.worker.step()
    pair = {"model": "shop", "version": "1"}
    assert setup.count("merge_rows_total", **pair, code="ok") == 2
    assert setup.count("dead_letters_total", code="unreadable") == 1
    assert (setup.count("merge_poll_records_sum"), setup.count("merge_batch_rows_sum")) == (3, 2)
    assert setup.count("merge_feature_age_seconds_sum", **pair) == 0.010
    for stage in ("poll", "decode", "features", "forward", "encode", "send"):
        assert setup.count("merge_stage_seconds_count", stage=stage) == 1


def test_answers_are_counted_once_they_lie_in_kafka(setup):
    """The first flush loses them: the rows come again, and count once."""
    setup.ask(1)
    setup.outbox.failures = 1
    with pytest.raises(Unavailable):
        setup.worker.step()
    pair = {"model": "shop", "version": "1", "code": "ok"}
    assert setup.count("merge_rows_total", **pair) is None
    setup.worker.step()
    assert setup.count("merge_rows_total", **pair) == 1


def test_a_poll_that_brings_nothing_is_not_counted(setup):
    """Else an idle worker's waiting would be all that its durations say."""
    setup.worker.step()
    assert setup.count("merge_poll_records_count") == 0


def test_a_worker_that_waits_for_kafka_goes_round_and_is_alive(setup, monkeypatch):
    """Each poll fails; after the third round it is told to end, and each round was said."""
    stopping, rounds = threading.Event(), []

    class Counted(Health):
        def beat(self):
            rounds.append(self.live())
            if len(rounds) == 3:
                stopping.set()

    def away(*_):
        raise Unavailable("Kafka is away")

    setup.telemetry.health = Counted()
    monkeypatch.setattr(worker_module, "PAUSE_S", 0)
    monkeypatch.setattr(setup.inbox, "poll", away)
    setup.worker.run(stopping, lambda: False, lambda: None)
    assert rounds == [None] * 3
