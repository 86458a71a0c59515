import time
from concurrent.futures import Executor, Future

import numpy as np
import pytest

from hybrid.deployment import Window
from hybrid.errors import Unavailable
from serving.deployments import Deployments
from serving.merge import probe
from serving.shadow import Shadows
from serving.telemetry import Telemetry
from serving.testing import SumModels, deployment
from serving.tests.test_worker import Setup


class Later(Executor):
    """Runs what it was given when it is told to."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, /, *arguments):
        self.waiting.append(lambda: function(*arguments))
        return Future()

    def run(self):
        while self.waiting:
            self.waiting.pop()()


class Broken(SumModels):
    """One version's tower fails, or gives no numbers."""

    def __init__(self, version, *, to="fail"):
        super().__init__()
        self.version, self.to = version, to

    def infer(self, model, version, *others):
        found = super().infer(model, version, *others)
        if version == self.version and self.to == "fail":
            raise Unavailable("told to fail")
        return found * np.nan if version == self.version else found


def learned(version, missing=(0.25, 0.5)):
    return deployment(version).model_copy(update={"missing_device": missing})


class Shade:
    """Version 2 as the shadow of version 1, on a batch of one row of zeros."""

    def __init__(self, models=None, default=None, shadow=None):
        self.telemetry, self.threads, self.models = Telemetry(), Later(), models or SumModels()
        self.default, self.shadow = default or learned(1), shadow or learned(2)
        self.shadows = Shadows(self.models, self.telemetry, threads=self.threads, draw=lambda: 0.5)

    def offer(self, share=1.0):
        self.shadows.offer(*probe(self.default), self.shadow, share)

    def count(self, name, version, **labels):
        about = {"model": "shop", "version": str(version), **labels}
        return self.telemetry.registry.get_sample_value(f"hybrid_shadow_{name}", about)


def test_both_run_on_the_same_rows_without_a_device():
    """Zeros sum to 0; the head adds what was learned for a missing device, 0.75. Either is counted and timed."""
    shade = Shade()
    shade.offer()
    assert shade.models.calls == [], "nobody waits for it"
    shade.threads.run()
    assert shade.models.calls == [
        ("shop_server_tower", 1, 1),
        ("shop_head", 1, 1),
        ("shop_server_tower", 2, 1),
        ("shop_head", 2, 1),
    ]
    for version in (1, 2):
        assert shade.count("batches_total", version, code="ok") == 1
        assert shade.count("rows_total", version, code="ok") == 1
        assert shade.count("seconds_count", version) == 1
        assert shade.count("prediction_bucket", version, le="0.7") == 0
        assert shade.count("prediction_bucket", version, le="0.75") == 1


def test_without_a_learned_embedding_of_either_no_prediction_is_compared():
    """The head runs, on zeros: it is there, and takes its time."""
    shade = Shade(shadow=learned(2, ()))
    shade.offer()
    shade.threads.run()
    assert shade.count("batches_total", 2, code="ok") == 1
    assert shade.count("prediction_bucket", 1, le="+Inf") is None


@pytest.mark.parametrize(("to", "code"), [("fail", "unavailable"), ("give none", "not_finite")])
def test_a_shadow_that_fails_is_counted_and_the_next_batch_runs(to, code):
    """The default beside it is not touched."""
    shade = Shade(Broken(2, to=to))
    for _ in range(2):
        shade.offer()
        shade.threads.run()
    assert shade.count("batches_total", 2, code=code) == 2
    assert shade.count("batches_total", 1, code="ok") == 2


def test_a_batch_that_comes_while_one_runs_is_dropped():
    """And one that is not drawn is none of it: 0.5 is not below 0.5."""
    shade = Shade()
    shade.offer(share=0.5)
    shade.offer()
    shade.offer()
    shade.threads.run()
    assert shade.count("batches_total", 2, code="dropped") == 1
    assert shade.count("batches_total", 2, code="ok") == 1
    shade.offer()
    shade.threads.run()
    assert shade.count("batches_total", 2, code="ok") == 2


def test_a_worker_offers_the_defaults_batches_once_they_were_answered(tmp_path):
    """Not those of the shadow itself, nor after a promotion of what reads other features."""
    setup = Setup(tmp_path)
    window = Window(versions=(learned(1),)).shade(learned(2), 1.0)
    (tmp_path / "shop.json").write_text(window.model_dump_json())
    seen = []

    class Seen(Shadows):
        def offer(self, batch, joined, shadow, share):
            seen.append((batch.deployment.version, shadow.version, share, len(setup.answered)))

    setup.worker._deployments, setup.worker._shadows = Deployments(tmp_path), Seen(setup.models, setup.telemetry)
    setup.ask(1)
    setup.ask(2, version=2)
    setup.worker.step()
    assert seen == [(1, 2, 1.0, 2)]


def test_real_threads_run_a_shadow_and_end():
    """With the context no thread is left."""
    shade = Shade()
    with Shadows(shade.models, shade.telemetry, draw=lambda: 0.0) as shadows:
        shadows.offer(*probe(shade.default), shade.shadow, 1.0)
        deadline = time.monotonic() + 10
        while not shade.count("batches_total", 2, code="ok"):
            assert time.monotonic() < deadline
