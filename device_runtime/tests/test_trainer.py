import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from device_runtime.trainer import Limits, Trainer
from hybrid import Bucketize, Log1p, Numeric
from hybrid.bundle import Bundle, Keeping, Manifest
from hybrid.errors import BundleError, PlanError
from hybrid.export.training import training_program
from hybrid.federation.engine import Engine
from hybrid.federation.population import Examples
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.plan import Local, TrainPlan
from hybrid.spec import load_model

COUPON = Path(__file__).parents[2] / "examples" / "coupon" / "model.py"
ROWS = [1, 3, 16, 17, 40]  # of each user: the program takes 16 at a time
MOST = 4  # the user with 40
LARGE = 1e6  # a clip that no update reaches
LR = 0.1  # with much more, steps overshoot and double each rounding, on either side


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small run slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normed():
    """Layers that are no `Linear`: a simulation trains them by `torch.func`."""
    return nn.Sequential(nn.LazyLinear(24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 16), nn.SiLU())


class People:
    """One model, its bundle with a training program, and users with 1 to 40 examples as both sides hold them."""

    def __init__(self, model, *, server_tower=False, missing=False, keeping=None):
        self.network = Network.build(model, seed=3)
        for vector in self.network.missing.values():
            nn.init.normal_(vector.weight)
        self.server_tower, self.missing = server_tower, missing
        program, train = training_program(self.network, server_tower=server_tower, missing=missing)
        self.manifest = Manifest(
            model=model.name,
            version=7,
            definition_hash="ab" * 32,
            features=model.device_features,
            server_embedding=self.network.server_embedding,
            device_embedding=self.network.device_embedding,
            merge=model.merge,
            release=model.release,
            programs={},
            train=train,
            keeping=keeping or Keeping(),
        )
        self.bundle = Bundle(self.manifest, {"train.pte": program})
        rng, self.offsets = np.random.default_rng(11), np.r_[0, np.cumsum(ROWS)]
        self.inputs = drawn(model.device_features, self.offsets[-1], rng)
        self.slots = model.server_features.slots(drawn(model.server_features, self.offsets[-1], rng))
        self.labels = rng.integers(0, 2, self.offsets[-1]).astype(np.float32)

    def engine(self, local, dropout=0.0):
        features, server = self.network.model.device_features, self.network.model.server_features
        device = features.encode(features.slots(self.inputs))
        examples = Examples(server.encode(self.slots), device, self.labels, self.offsets, "people")
        return Engine.build(
            self.network, examples, local, federate_server_tower=self.server_tower, tower_dropout=dropout
        )

    def of(self, user):
        """What the user's device keeps: (server, inputs, labels)."""
        here = slice(self.offsets[user], self.offsets[user + 1])
        server = self.slots[here]
        if not self.server_tower:
            with torch.no_grad():
                server = self.network.server_program()(torch.from_numpy(server)).numpy()
        return server, self.inputs[here], self.labels[here]

    def plan(self, local=None, **changes):
        fields = {
            "id": "0" * 32,
            "model": self.manifest.model,
            "version": 7,
            "definition_hash": "ab" * 32,
            "expires_ms": 1,
            "local": local or Local(steps=20, lr=0.3),
            "clip": LARGE,
            "parameters": Trainer(self.bundle).parameters,
        }
        return TrainPlan(**fields | changes)

    @cached_property
    def weights(self):
        """Read-only, as a plan's are."""
        weights = self.engine(LocalTraining(steps=1, lr=0.1), 0.1 * self.missing).side.flat()
        weights.flags.writeable = False
        return weights

    def train(self, user=MOST, plan=None, go_on=lambda: True, trainer=None, seed=5, weights=None):
        """What the user's device sends."""
        weights = self.weights if weights is None else weights
        rng = np.random.default_rng((seed, user))
        return (trainer or Trainer(self.bundle)).train(
            plan or self.plan(), weights, *self.of(user), go_on=go_on, rng=rng
        )


def drawn(features, rows, rng):
    """(rows, features) inputs as people may have them, of which a tenth are missing; text may be unseen too."""

    def column(transform):
        if transform.text:
            return rng.integers(0, transform.cardinality, rows)
        ordinary = rng.normal(transform.mean, transform.std, rows) if isinstance(transform, Numeric) else None
        numbers = rng.uniform(0, 7, rows) if ordinary is None else ordinary
        return np.where(rng.random(rows) < 0.1, np.nan, numbers)

    return np.stack([column(transform) for transform in features.transforms.values()], axis=1).astype(np.float32)


@pytest.fixture(scope="session")
def coupon():
    return People(load_model(COUPON), missing=True)


@pytest.fixture(scope="session")
def whole():
    """The server tower is trained by devices too, and layers are not all `Linear`."""
    model = load_model(COUPON)
    more = {"hours": Bucketize(edges=(1.0, 2.0, 5.0)), "count": Log1p(mean=1, std=2)}
    model = model.model_copy(update={"device_tower": normed, "device": {**model.device, **more}})
    return People(model, server_tower=True, missing=True)


@pytest.fixture(params=["coupon", "whole"])
def people(request):
    return request.getfixturevalue(request.param)


LOCALS = {
    "20 steps": {"steps": 20},
    "20 steps of 7 rows": {"steps": 20, "batch": 7},
    "20 steps of 20 rows": {"steps": 20, "batch": 20},
    "epochs": {"epochs": 20},
    "epochs of batches": {"epochs": 4, "batch": 7},
    "proximal": {"steps": 20, "proximal": 0.5},
    "proximal, batches": {"epochs": 4, "batch": 7, "proximal": 0.5},
    "balance": {"steps": 20, "keep": (0.4, 0.9)},
    "balance, batches": {"epochs": 8, "batch": 7, "keep": (1.0, 0.3)},
}


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["whole", "tower dropout"])
@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_a_device_trains_as_the_simulator_does(people, local, dropout):
    """For users of 1 to 40 rows, 20 steps or more, every option: each weight moves as in the engine, to 1e-4.

    The engine leaves out whoever is left with no example; the device sends zeros then.
    """
    engine = people.engine(LocalTraining(**{"steps": None, "lr": LR} | local), dropout)
    plan = people.plan(Local(**{"steps": None, "lr": LR, "tower_dropout": dropout} | local))
    for user in range(len(ROWS)):
        trained = list(engine.updates(engine.side.flat(), np.array([user]), stream=(5, user)))
        expected = trained[0][0] if trained else np.zeros(engine.size, np.float32)
        got = people.train(user, plan)
        # Without tower dropout a simulation does not train the embeddings for a missing side, which come last.
        np.testing.assert_allclose(got[: engine.size], expected, atol=1e-4)
        assert dropout or not got[engine.size :].any()
        assert 0.02 < np.abs(expected).max() < 2 or not (trained or got.any())
        assert trained or ("keep" in local and ROWS[user] < 4)


def test_whoever_is_left_with_no_example_sends_zeros(coupon):
    """With one label only, of which one in a billion is kept: an update all the same, as anybody else's."""
    server, inputs, labels = coupon.of(1)
    plan = coupon.plan(Local(steps=2, lr=0.3, keep=(1e-9, 1.0)))
    trainer = Trainer(coupon.bundle)
    rest = {"go_on": lambda: True, "rng": np.random.default_rng(0)}
    update = trainer.train(plan, coupon.weights, server, inputs, np.zeros_like(labels), **rest)
    assert (update.shape, update.any(), trainer.gave_up) == ((trainer.parameters,), False, None)


def test_a_program_without_embeddings_for_a_missing_side_trains_as_the_simulator_does():
    """What `hybrid train` does by default: nothing is added to device tower and head."""
    people = People(load_model(COUPON))
    engine = people.engine(LocalTraining(steps=20, lr=0.3))
    (expected,) = engine.updates(engine.side.flat(), np.array([MOST]))
    assert Trainer(people.bundle).parameters == engine.size
    np.testing.assert_allclose(people.train(MOST, weights=engine.side.flat()), expected[0], atol=1e-4)
    with pytest.raises(PlanError, match=r"local.tower_dropout must be 0: the bundle's program trains no embeddings"):
        people.train(MOST, people.plan(Local(steps=1, lr=0.1, tower_dropout=0.1)))


def test_the_update_is_clipped_as_a_whole(coupon):
    """Longer than the clip it is scaled to it, in the same direction; shorter it stays; zero stays zero."""
    free = coupon.train()
    norm = float(np.linalg.norm(free))
    clipped = coupon.train(plan=coupon.plan(clip=norm / 3))
    np.testing.assert_allclose(clipped, free / 3, rtol=1e-5)
    np.testing.assert_array_equal(coupon.train(plan=coupon.plan(clip=norm * 1.001)), free)
    still = coupon.train(plan=coupon.plan(Local(steps=1, lr=1e-60)))
    assert not still.any()


def test_the_newest_examples_are_taken_where_there_are_more(coupon):
    """40 rows and a most of 33: as if the oldest 7 had never been kept."""
    server, inputs, labels = coupon.of(MOST)
    plan, weights = coupon.plan(examples=(1, 33)), coupon.weights
    limited = coupon.train(plan=plan)
    rest = [part[7:] for part in (server, inputs, labels)]
    expected = Trainer(coupon.bundle).train(
        coupon.plan(), weights, *rest, go_on=lambda: True, rng=np.random.default_rng(1)
    )
    np.testing.assert_array_equal(limited, expected)


@pytest.mark.parametrize("chunks", [0, 1, 2, 25, 39])
def test_an_interrupted_training_gives_nothing_and_leaves_nothing(coupon, chunks):
    """Told to stop before any of its 40 chunks it sends nothing; the same trainer's next training gives the bits that
    one without an interruption gives."""
    plan = coupon.plan(Local(steps=20, lr=0.3, batch=39, tower_dropout=0.2))
    asked = []
    trainer = Trainer(coupon.bundle)
    assert coupon.train(plan=plan, go_on=lambda: asked.append(1) or len(asked) <= chunks, trainer=trainer) is None
    assert trainer.gave_up == "it was told to stop"
    assert len(asked) == chunks + 1
    np.testing.assert_array_equal(coupon.train(plan=plan, trainer=trainer), coupon.train(plan=plan))
    assert trainer.gave_up is None


def test_weights_and_examples_are_left_as_they_were(coupon):
    """Training reads what it is given, the plan's read-only weights included, and changes none of it."""
    weights, before = coupon.weights, coupon.weights.copy()
    kept = [part.copy() for part in coupon.of(MOST)]
    coupon.train(weights=weights)
    np.testing.assert_array_equal(weights, before)
    for part, copy in zip(coupon.of(MOST), kept, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_a_training_that_takes_too_long_is_given_up(coupon):
    """The clock stands at 61 s when the fourth chunk is asked for: at a limit of 60 s nothing is sent."""
    ticks = iter([0.0, 1.0, 59.0, 60.0, 61.0])
    trainer = Trainer(coupon.bundle, clock=lambda: next(ticks))
    assert coupon.train(trainer=trainer) is None
    assert trainer.gave_up == "it took more than 60 s"


def test_a_training_that_takes_too_much_memory_is_given_up(coupon):
    """500 MiB before it and 1013 within are 513 more, of 512 allowed."""
    taken = iter([500.0, 1013.0])
    trainer = Trainer(coupon.bundle, resident=lambda: next(taken))
    assert coupon.train(trainer=trainer) is None
    assert trainer.gave_up == "it took more than 512 MiB of memory"


def test_the_lower_of_plan_and_bundle_holds(coupon):
    """A plan may ask for less than the model's own limits, never for more; what was lowered is named."""
    keeping = Keeping(max_examples=10, max_seconds=5.0, max_memory_mb=100)
    asked = coupon.plan(examples=(1, 20), seconds=1.0, memory_mb=512)
    assert Limits.of(asked, keeping) == Limits(10, 1.0, 100, lowered=("examples", "memory_mb"))


def test_the_bundle_s_limit_of_examples_holds_against_a_plan_that_asks_for_more(coupon):
    """40 rows, 33 allowed by the bundle, 1024 asked for by the plan: 33 are trained with."""
    bundle = Bundle(coupon.manifest.model_copy(update={"keeping": Keeping(max_examples=33)}), coupon.bundle.programs)
    limited = coupon.train(trainer=Trainer(bundle))
    np.testing.assert_array_equal(limited, coupon.train(plan=coupon.plan(examples=(1, 33))))


def test_too_few_examples_train_nothing(coupon):
    """A plan that wants four gets nothing of a user with three."""
    trainer = Trainer(coupon.bundle)
    assert coupon.train(1, coupon.plan(examples=(4, 100)), trainer=trainer) is None
    assert trainer.gave_up == "there must be at least 4 examples"


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_training_that_diverges_gives_nothing(coupon, lr):
    """Weights that are no numbers are never sent, and the reason names the setting."""
    trainer = Trainer(coupon.bundle)
    assert coupon.train(plan=coupon.plan(Local(steps=20, lr=lr)), trainer=trainer) is None
    assert trainer.gave_up == "the weights left the finite numbers: the plan's lr may be too high"


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"version": 8}, {"definition_hash": "cd" * 32}], ids=["model", "version", "hash"]
)
def test_a_plan_for_another_bundle_is_refused(coupon, change):
    """A model, version or definition that is not the bundle's own: its weights would mean something else."""
    with pytest.raises(PlanError, match="must be for the bundle's coupon:7"):
        coupon.train(plan=coupon.plan(**change))


def test_weights_of_another_number_are_refused(coupon):
    """By what the plan says, and by what it brings."""
    size = Trainer(coupon.bundle).parameters
    with pytest.raises(PlanError, match=f"must have the program's {size} weights, got {size + 1}"):
        coupon.train(plan=coupon.plan(parameters=size + 1))
    with pytest.raises(PlanError, match="weights of shape"):
        coupon.train(weights=np.zeros(size + 1, np.float32))


def test_a_bundle_without_a_training_program_does_not_train(coupon):
    """Neither its manifest nor its files may lack it; a program that is none of ExecuTorch's is said to be."""
    with pytest.raises(BundleError, match=r"must hold a training program 'train.pte'"):
        Trainer(Bundle(coupon.manifest.model_copy(update={"train": None}), coupon.bundle.programs))
    with pytest.raises(BundleError, match=r"must hold a training program 'train.pte'"):
        Trainer(Bundle(coupon.manifest, {}))
    with pytest.raises(BundleError, match="does not load in executorch"):
        coupon.train(trainer=Trainer(Bundle(coupon.manifest, {"train.pte": b"garbage" * 100})))


def test_a_program_that_is_not_what_its_manifest_says_is_refused(coupon):
    """Other rows than the manifest's: a BundleError, not a crash."""
    train = coupon.manifest.train.model_copy(update={"rows": 8})
    bundle = Bundle(coupon.manifest.model_copy(update={"train": train}), coupon.bundle.programs)
    with pytest.raises(BundleError, match=r"'train.pte' does not take what its manifest says"):
        coupon.train(trainer=Trainer(bundle))


def test_the_log_holds_no_number_of_the_person_s(coupon, caplog):
    """What a training says of itself: the plan, the setting, the limit."""
    caplog.set_level("INFO")
    plan = "0" * 32
    coupon.train(plan=coupon.plan(Local(steps=20, lr=1e38), seconds=1e6))
    assert [record.getMessage() for record in caplog.records if record.name == "device_runtime.trainer"] == [
        f"plan {plan} asks for more seconds than the bundle allows: 60.0",
        f"training for plan {plan} gave no update: the weights left the finite numbers: the plan's lr may be too high",
    ]


def test_importing_the_trainer_brings_nothing_heavy():
    """torch and ExecuTorch come with the first training, not with the import."""
    code = "import sys, device_runtime.trainer; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "executorch", "flwr", "pyarrow"}.isdisjoint(loaded)
