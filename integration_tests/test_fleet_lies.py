"""Devices that lie, 30 of a hundred, against the aggregator's service: what they can move, and what they cannot."""

import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hybrid.errors import ConfigError
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import listening
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import FleetAggregator, Refused, Task
from hybrid.plan import CHECK_IN, UPDATE, CheckIn, Local, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import clip_rows
from hybrid.update import encode, head
from serving.testing import Certificate

SIZE, CLIP, HONEST, LIARS = 2000, 0.5, 70, 30
KEY = Ed25519PrivateKey.generate()
RANDOM = np.random.default_rng(3)
# A little shorter than the clip: rounded to float32, one of its length could be longer.
HONEST_UPDATES = clip_rows(RANDOM.normal(size=(HONEST, SIZE)), 0.99 * CLIP).astype(np.float32)
DIRECTION = clip_rows(RANDOM.normal(size=(1, SIZE)), CLIP)[0].astype(np.float32)
SUM = HONEST_UPDATES.astype(np.float64).sum(axis=0)
TASK = Task(
    model="kiosk",
    version=4,
    definition_hash="ab" * 32,
    local=Local(steps=1, lr=0.1),
    parameters=SIZE,
    round_s=60,
    wanted=HONEST + LIARS,
)


def sent(update: np.ndarray) -> bytes:
    """Of any numbers: what honest code would not encode."""
    return head(SIZE, "float32") + update.astype("<f4").tobytes()


class Fleet:
    """Devices of one aggregator.

    Attributes:
        statuses: of all uploads so far.
    """

    def __init__(self, aggregator: FleetAggregator, clock: ManualClock, client: httpx.Client) -> None:
        self.aggregator, self._clock, self._client = aggregator, clock, client
        self.statuses: list[int] = []
        self._number = self._uploads = 0

    @contextmanager
    def round(self) -> Iterator[tuple[str, list]]:
        """An open round's plan, and where its release will be."""
        self._number += 1
        found = []
        run = lambda: self.aggregator.run_round(self._number, np.zeros(SIZE, np.float32))  # noqa: E731
        with self._clock.during(run, 60) as release:
            body = self._client.post(CHECK_IN, json=CheckIn(model="kiosk", version=4, runtime=1).model_dump()).content
            yield open_signed(body, KEY.public_key())[0].id, found
        found.append(release.result().sum)

    def upload(self, plan: str, body: bytes, upload: str | None = None) -> str:
        self._uploads += 1
        name = upload or f"{self._uploads:032x}"
        self.statuses.append(self._client.put(UPDATE.format(plan=plan, upload=name), content=body).status_code)
        return name

    def honest(self, plan: str) -> list[str]:
        return [self.upload(plan, sent(update)) for update in HONEST_UPDATES]


@contextmanager
def fleet(noise: float = 0.0, ledger: Ledger | None = None) -> Iterator[Fleet]:
    clock = ManualClock()
    aggregator = FleetAggregator(TASK, Round(1.0, CLIP, noise, minimum=0), ledger, KEY, clock=clock)
    with listening(aggregator) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield Fleet(aggregator, clock, client)


LIES: dict[str, Callable[[], bytes]] = {
    "thousand-fold": lambda: sent(-1000 * DIRECTION),
    "huge": lambda: sent(np.full(SIZE, 3e38)),
    "not a number": lambda: sent(np.full(SIZE, np.nan)),
    "one infinity": lambda: sent(np.r_[np.inf, DIRECTION[1:]]),
    "one byte more": lambda: sent(DIRECTION) + b"\0",
    "another encoding": lambda: encode(DIRECTION, "int8", RANDOM),
    "nothing": lambda: b"",
}
TAKEN = {"thousand-fold": CLIP, "huge": CLIP, "not a number": 0.0, "one infinity": 0.0}  # the norm that each moves by
COUNTED = {"one byte more": Refused.OVERSIZE, "another encoding": Refused.MALFORMED, "nothing": Refused.MALFORMED}


@pytest.mark.parametrize("lie", LIES)
def test_thirty_liars_move_the_sum_by_the_clip_each_at_most(lie: str):
    """By exactly the clip each where they agree on a direction, and by nothing where what they send is no update."""
    with fleet() as devices:
        with devices.round() as (plan, found):
            devices.honest(plan)
            for _ in range(LIARS):
                devices.upload(plan, LIES[lie]())
        moved = np.linalg.norm(found[0] - SUM)
    assert moved == pytest.approx(LIARS * TAKEN.get(lie, 0.0), abs=1e-9)
    assert devices.aggregator.refused == ({COUNTED[lie]: LIARS} if lie in COUNTED else {})


def test_replays_and_other_rounds_updates_move_nothing():
    """For an earlier plan, for an unknown one, under honest ids with other bytes, after the end; and mere repeats."""
    with fleet() as devices:
        with devices.round() as (earlier, found):
            names = devices.honest(earlier)
        with devices.round() as (_, _):
            pass
        with devices.round() as (plan, found):
            names = devices.honest(plan)
            devices.statuses.clear()
            for number in range(10):
                devices.upload(earlier, sent(DIRECTION))
                devices.upload("0" * 32, sent(DIRECTION))
                devices.upload(plan, sent(DIRECTION), names[number])
                devices.upload(plan, sent(HONEST_UPDATES[number]), names[number])
        devices.upload(plan, sent(DIRECTION))
        np.testing.assert_allclose(found[0], SUM, atol=1e-12)
    assert Counter(devices.statuses) == {410: 11, 404: 10, 409: 10, 200: 10}
    assert devices.aggregator.refused == {Refused.STALE: 11, Refused.UNKNOWN_PLAN: 10, Refused.REPLAYED: 10}


def test_the_open_counts_are_the_same_whether_a_device_sends_numbers_or_none():
    """A device that sends zeros, NaN or an update is answered and counted alike."""
    seen = []
    for body in (sent(np.zeros(SIZE)), sent(np.full(SIZE, np.nan)), sent(DIRECTION)):
        with fleet() as devices:
            with devices.round() as (plan, _):
                name = devices.upload(plan, body)
                devices.upload(plan, body, name)
            seen.append((devices.statuses, dict(devices.aggregator.refused)))
    assert seen[0] == seen[1] == seen[2] == ([200, 200], {})


def test_liars_change_neither_the_noise_nor_what_it_costs(tmp_path: Path):
    """z = 4 over a clip of 0.5: N(0, 4), with 30 liars of each kind or with none; the sample is of 2,000 weights.

    Its deviation is 2, give or take 5 / sqrt(4000) of it. The ledger says the same of both rounds.
    """
    with Ledger.open(tmp_path, budget_epsilon=100, delta=1e-5) as ledger:
        with fleet(4.0, ledger) as devices:
            sums = []
            for lies in ([], list(LIES)):
                with devices.round() as (plan, found):
                    devices.honest(plan)
                    for lie in lies:
                        for _ in range(LIARS if TAKEN.get(lie) != CLIP else 0):
                            devices.upload(plan, LIES[lie]())
                sums.append(found[0])
        entries = [(entry.noise_multiplier, entry.sampling, entry.clip, entry.attempt) for entry in ledger.entries]
    assert entries == [(4.0, 1.0, CLIP, 1)] * 2
    for total in sums:
        assert (total - SUM).std() == pytest.approx(2, rel=5 / np.sqrt(2 * SIZE))
    assert np.abs(sums[0] - sums[1]).min() > 0


def test_devices_check_in_over_tls(tmp_path: Path):
    """With the service's own certificate; who does not trust it says nothing."""
    certificate = Certificate.write(tmp_path, "aggregator")
    aggregator = FleetAggregator(TASK, Round(1.0, CLIP, 0.0, minimum=0), None, KEY)
    with listening(aggregator, certificate=(certificate.chain, certificate.key)) as port:
        url, said = f"https://127.0.0.1:{port}{CHECK_IN}", CheckIn(model="kiosk", version=4, runtime=1).model_dump()
        trusted = ssl.create_default_context(cafile=str(certificate.chain))
        assert httpx.post(url, json=said, verify=trusted).status_code == 204
        with pytest.raises(httpx.ConnectError):
            httpx.post(url, json=said)
    with pytest.raises(ConfigError, match="certificate"), listening(aggregator, certificate=(tmp_path, tmp_path)):
        pass
