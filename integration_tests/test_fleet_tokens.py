"""Anonymous check-in of real devices: an issuer that knows accounts, an aggregator that knows none, over HTTP."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from device_runtime.aggregator import Aggregator
from device_runtime.credentials import Credentials
from device_runtime.eligibility import Readings
from device_runtime.host import ScriptedHost
from device_runtime.participation import Ending, Participation
from device_runtime.program import open_bundle
from device_runtime.store import Store
from device_runtime.trainer import Trainer
from hybrid.bearer import new_token
from hybrid.bundle import trusted_key
from hybrid.errors import AggregatorError, IssuerError
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import Tokens, listening
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import FleetAggregator
from hybrid.federation.issuer import RemoteIssuer
from hybrid.federation.remote import RemoteAggregator
from hybrid.files import write_whole
from hybrid.local.devices import GOOD, Opened, running
from hybrid.local.fleet import Order, issuing, service, train
from hybrid.local.process import free_ports
from hybrid.plan import UPDATE, open_signed
from hybrid.privacy.matrix import optimised
from hybrid.tokens import TOKEN_BYTES, Token
from integration_tests.test_fleet_rounds import KEY, LAX, World
from integration_tests.test_fleet_wire import promoted
from serving.access import ApiKey

PEOPLE, SECOND = 6, 3  # people, and how many of them have a second device
QUIET = Round(1.0, 0.05, 0.0, minimum=0)
KILLS = int(os.environ.get("HYBRID_TEST_KILLS", "6"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fleet"))


def people_of(world: World, count: int):
    return replace(world.people, offsets=world.people.offsets[: count + 1])


def one_round(world, folder, *, tokens: bool) -> tuple[Counter, int, dict]:
    """How the sessions of two processes of devices ended, how many updates were in the sum, and what was refused."""
    clock, owners = ManualClock(), [*range(PEOPLE), *range(SECOND)]
    with ExitStack() as stack:
        issued = stack.enter_context(issuing(folder / "issuer", PEOPLE)) if tokens else None
        windows = issued.windows if issued else None
        aggregator = FleetAggregator(world.task(), QUIET, None, world.key, windows=windows, clock=clock)
        port = stack.enter_context(listening(aggregator))
        release = stack.enter_context(clock.during(lambda: aggregator.run_round(1, world.weights), 3600))
        opened = Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", 3600)
        if issued:
            opened = replace(opened, issuer=issued.url, accounts=[issued.keys[owner] for owner in owners])
        both = stack.enter_context(running(opened, people_of(world, PEOPLE).twice(SECOND), folder, processes=2))
        both.wait_ready()
        endings = both.finish()
    return endings, release.result().received, dict(aggregator.refused)


def test_a_person_with_two_devices_counts_once_in_a_round(world, tmp_path):
    """Six people, three of them with a second device: with tokens six updates, and nine without."""
    for tokens in (True, False):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        endings, received, refused = one_round(world, folder, tokens=tokens)
        counted = PEOPLE if tokens else PEOPLE + SECOND
        assert (received, refused) == (counted, {})
        assert endings == Counter({"uploaded": counted} | ({"account_waits": SECOND} if tokens else {}))


def test_a_training_with_tokens_protects_users(world, tmp_path):
    """Two rounds, everybody in each: the sums have a person once, and the record says whom its epsilon is of."""
    going_on, people = promoted(world, 2), people_of(world, PEOPLE)
    with going_on.paid(6.0, PEOPLE, tmp_path / "run") as (settings, ledger):
        order = Order(going_on, settings, people, 15.0, 1, world.folder / "keys", print, tokens=True, second=SECOND)
        outcome = train(order, ledger, 0)
        about = {"users": PEOPLE, "examples": None, "aggregators": 1, "population": "people", "run": "run"}
        record = going_on.record(settings, ledger, tokens=True, **about)
    assert (outcome.failed, outcome.refused) == (0, {})
    assert outcome.endings["uploaded"] == 2 * PEOPLE
    assert outcome.endings["account_waits"] >= 2 * SECOND
    assert record.unit == "user"
    assert "the issuer of tokens sees to that" in record.assumption


def test_an_aggregators_process_asks_for_tokens_of_its_issuer(world, tmp_path):
    """Told of it by its settings and a token: an older device is given no plan, a newer one the issuer's window."""
    with issuing(tmp_path / "issuer", 1) as issued:
        own = tmp_path / "aggregator"
        own.mkdir()
        told = service(world.task(round_s=30), QUIET, 1, None)
        tokens = Tokens(name="issuer.example", url=issued.windows.url, scope="kiosk")
        (own / "settings.json").write_text(told.model_copy(update={"tokens": tokens}).model_dump_json())
        write_whole(own / "issuer.token", issued.windows.token.encode(), private=True)
        options = {"settings": own / "settings.json", "folder": own, "keys": world.folder / "keys", "port": 0}
        options |= {"token": own / "token", "issuer-token": own / "issuer.token", "control-port": 0}
        control, words = new_token(own / "token"), [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "hybrid.federation.checkin", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as thread:
            try:
                devices, side = re.findall(r"port (\d+)", process.stdout.readline())
                opener = RemoteAggregator(url=f"http://127.0.0.1:{side}", token=control, run="r", timeout_s=20)
                thread.submit(opener.run_round, 1, world.weights)
                said, found = {"model": "kiosk", "version": 4, "runtime": 3}, None
                while found is None or found.status_code == 204:
                    found = httpx.post(f"http://127.0.0.1:{devices}/v1/check-in", json=said)
                older = httpx.post(f"http://127.0.0.1:{devices}/v1/check-in", json=said | {"runtime": 2})
            finally:
                process.terminate()
                process.wait(30)
    plan, _ = open_signed(found.content, world.key.public_key())
    assert (plan.token.issuer, plan.token.scope, plan.token.number) == ("issuer.example", "kiosk", 1)
    assert older.status_code == 204


def test_a_device_by_hand_shows_its_account_to_the_issuer_alone(world, tmp_path, recording):
    """As a command, with the key in the environment; what goes to the aggregator does not hold it."""
    (tmp_path / "consent").touch()
    (tmp_path / "readings.json").write_text(json.dumps([GOOD]))
    (tmp_path / "policy.json").write_text(LAX.model_dump_json())
    store, clock = world.store(tmp_path / "device.store", range(1)), ManualClock()
    with issuing(tmp_path / "issuer", 1) as issued, ExitStack() as stack:
        aggregator = FleetAggregator(world.task(), QUIET, None, world.key, windows=issued.windows, clock=clock)
        watched = stack.enter_context(recording(stack.enter_context(listening(aggregator))))
        release = stack.enter_context(clock.during(lambda: aggregator.run_round(1, world.weights), 3600))
        options = {"bundle": world.bundle, "trust": world.trust, "store": store, "key-file": world.key_file}
        options |= {name: tmp_path / file for name, file in (("consent", "consent"), ("readings", "readings.json"))}
        options |= {"policy": tmp_path / "policy.json", "aggregator": watched.url, "issuer": issued.url}
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "device_runtime", "train", *words]
        environment = {name: value for name, value in os.environ.items() if name != "HYBRID_API_KEY"}

        def run(**more):
            return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | more)

        nobody = run()
        assert "--issuer needs the account's key" in nobody.stderr
        assert json.loads(run(HYBRID_API_KEY="hybrid_0_x").stdout)["sessions"][0]["ending"] == "not_issued"
        done = run(HYBRID_API_KEY=issued.keys[0])
    assert json.loads(done.stdout)["sessions"][0]["ending"] == "uploaded", done
    assert release.result().received == 1
    sent = b"".join(bytes(each) for each in watched.sent)
    assert len(watched.sent) == 3  # two check-ins and an upload
    assert not any(part.encode() in sent for part in issued.keys[0].split("_", 2)[1:])


class Person:
    """An account, and its devices, which are in this process.

    Attributes:
        sent: what the aggregator got of it: (plan, upload, body).
    """

    def __init__(self, world: World, folder: Path, url: str, credentials: Credentials) -> None:
        self.world, self.folder, self.credentials, self.sent = world, folder, credentials, []
        self.aggregator, self.bundle = Aggregator(url), open_bundle(world.bundle, world.trust)
        self.trainer = Trainer(self.bundle)

    def device(self, name: str) -> Path:
        """The store of a new device."""
        return self.world.store(self.folder / f"{name}.store", range(1))

    def session(self, store: Path, toss: float = 0.0) -> Ending:
        async def upload(plan, name, body):
            self.sent.append((plan, name, body))
            return await self.aggregator.upload(plan, name, body)

        asked = type("Watched", (), {"check_in": self.aggregator.check_in, "upload": staticmethod(upload)})()
        with Store.open(store, KEY, self.world.manifest) as kept:
            participation = Participation(
                bundle=self.bundle,
                trainer=self.trainer,
                store=kept,
                host=ScriptedHost([Readings(**GOOD)]),
                aggregator=asked,
                trusted=trusted_key(self.world.trust),
                credentials=self.credentials,
                own=LAX,
                toss=lambda: toss,
            )
            return asyncio.run(participation.session()).ending


def test_a_wiped_device_waits_its_separation(world, tmp_path):
    """With turns, and a separation of 2: in step 1, not in step 2 whatever became of its store, again in step 3."""
    clock = ManualClock()
    settings = replace(QUIET, matrix=optimised("independent", 6, 2))
    with issuing(tmp_path / "issuer", 1) as issued:
        aggregator = FleetAggregator(
            world.task(),
            settings,
            None,
            world.key,
            noise_state=tmp_path / "noise.state",
            windows=issued.windows,
            clock=clock,
        )
        with listening(aggregator) as port:
            url = f"http://127.0.0.1:{port}"
            person = Person(world, tmp_path, url, Credentials(issued.url, issued.keys[0]))
            endings, received = [], []
            for number, name in ((1, "old"), (2, "wiped"), (3, "wiped again")):
                with clock.during(lambda number=number: aggregator.run_round(number, world.weights), 3600) as release:
                    endings.append(person.session(person.device(name)))
                received.append(release.result().received)
    assert (endings, received) == ([Ending.UPLOADED, Ending.ACCOUNT_WAITS, Ending.UPLOADED], [1, 0, 1])


def test_a_device_that_is_killed_after_it_asked_goes_on_with_the_same_token(world, tmp_path):
    """Its answer was lost, its process too: the next one asks the same, is answered the same, and is counted once."""
    clock = ManualClock()
    with issuing(tmp_path / "issuer", 1) as issued:
        aggregator = FleetAggregator(world.task(), QUIET, None, world.key, windows=issued.windows, clock=clock)
        with (
            listening(aggregator) as port,
            clock.during(lambda: aggregator.run_round(1, world.weights), 3600) as release,
        ):
            credentials = Credentials(issued.url, issued.keys[0])
            person = Person(world, tmp_path, f"http://127.0.0.1:{port}", credentials)
            store, answering = person.device("one"), credentials._caller.ask

            class Killed(Exception):
                pass

            async def killed(*arguments, **more):
                await answering(*arguments, **more)
                raise Killed

            credentials._caller.ask = killed
            with pytest.raises(Killed):
                person.session(store)
            credentials._caller.ask = answering
            assert person.session(store) is Ending.UPLOADED
    assert release.result().received == 1
    (taken,) = sqlite3.connect(tmp_path / "issuer" / "issuer.db").execute("SELECT account, number FROM taken")
    assert taken == ("person-0", 1)


def test_what_was_sent_cannot_be_sent_again_as_anothers(world, tmp_path):
    """Who saw an update on its way, as the aggregator does, and sends it under another id, or in the next round."""
    clock = ManualClock()
    with issuing(tmp_path / "issuer", 1) as issued, ExitStack() as stack:
        aggregator = FleetAggregator(world.task(), QUIET, None, world.key, windows=issued.windows, clock=clock)
        url = f"http://127.0.0.1:{stack.enter_context(listening(aggregator))}"
        person = Person(world, tmp_path, url, Credentials(issued.url, issued.keys[0]))
        with clock.during(lambda: aggregator.run_round(1, world.weights), 3600) as first:
            assert person.session(person.device("one")) is Ending.UPLOADED
            ((plan, _, body),) = person.sent
            assert httpx.put(url + UPDATE.format(plan=plan, upload="f" * 32), content=body).status_code == 409
        with clock.during(lambda: aggregator.run_round(2, world.weights), 3600) as second:
            said = {"model": "kiosk", "version": 4, "runtime": 3}
            later, _ = open_signed(httpx.post(f"{url}/v1/check-in", json=said).content, world.key.public_key())
            assert httpx.put(url + UPDATE.format(plan=later.id, upload="e" * 32), content=body).status_code == 403
    assert (first.result().received, second.result().received) == (1, 0)
    assert {str(reason): count for reason, count in aggregator.refused.items()} == {"spent": 1, "forged": 1}


def test_issuer_and_aggregator_hold_nothing_that_they_could_join(world, tmp_path):
    """All that went over the wire, of three accounts: no 16 bytes of a token or an upload are in what the issuer saw.

    But for the bytes that all have, which are those of the window. That a pairing could not be found by computing
    either is tested where the blinding is: any request may have become any token.
    """
    clock, asked = ManualClock(), []
    with issuing(tmp_path / "issuer", 3) as issued, ExitStack() as stack:
        aggregator = FleetAggregator(world.task(), QUIET, None, world.key, windows=issued.windows, clock=clock)
        url = f"http://127.0.0.1:{stack.enter_context(listening(aggregator))}"
        stack.enter_context(clock.during(lambda: aggregator.run_round(1, world.weights), 3600))
        people = []
        for number, key in enumerate(issued.keys):
            credentials = Credentials(issued.url, key)
            folder = tmp_path / str(number)
            folder.mkdir()
            people.append(Person(world, folder, url, credentials))
            answering = credentials._caller.ask

            async def watched(method, path, content, headers, *, most, answering=answering):
                reply = await answering(method, path, content, headers, most=most)
                asked.append(path.encode() + content + b"".join(map(str.encode, headers.values())) + reply.body)
                return reply

            credentials._caller.ask = watched
        assert [person.session(person.device("one")) for person in people] == [Ending.UPLOADED] * 3
    bodies = [body for person in people for _, _, body in person.sent]
    tokens = [Token.read(body[:TOKEN_BYTES]) for body in bodies]
    assert len({(token.challenge, token.key_id) for token in tokens}) == 1
    assert len({token.nonce for token in tokens}) == len(tokens) == len(asked) == 3
    seen = b"".join(asked) + (tmp_path / "issuer" / "issuer.db").read_bytes()
    for token, body in zip(tokens, bodies, strict=True):
        own = token.nonce + token.authenticator + body[TOKEN_BYTES:]
        assert not any(own[at : at + 16] in seen for at in range(0, len(own) - 16, 4))


def test_kill_9_of_issuer_and_devices_counts_no_account_twice(world, tmp_path):
    """Rounds of some seconds of two people with two devices each; issuer and devices are killed in turns.

    In no round are there more updates than people, and in the end both are in one.
    """
    issued = [ApiKey.issue(name) for name in ("ann", "bob")]
    (tmp_path / "api-keys").write_text("\n".join(str(line) for line, _ in issued))
    write_whole(tmp_path / "token", b"c" * 40, private=True)
    ports = free_ports(2)
    words = ["--folder", tmp_path / "issuer", "--api-keys", tmp_path / "api-keys", "--token", tmp_path / "token"]
    words += ["--port", ports[0], "--control-port", ports[1]]
    name = f"127.0.0.1:{ports[0]}"
    windows = RemoteIssuer(name=name, url=f"http://127.0.0.1:{ports[1]}", token="c" * 40, scope="kiosk")
    random, received = np.random.default_rng(5), []

    def start():
        command = [sys.executable, "-m", "serving.issuer", *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        return process

    with ExitStack() as stack:
        aggregator = FleetAggregator(world.task(round_s=3, wanted=4), QUIET, None, world.key, windows=windows)
        port = stack.enter_context(listening(aggregator))
        accounts = [issued[owner][1] for owner in (0, 1, 0, 1)]
        opened = Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", 0.5, f"http://{name}", accounts)
        devices = stack.enter_context(running(opened, people_of(world, 2).twice(2), tmp_path, processes=1))
        (fleet,) = devices._started
        command, over = fleet.args, []

        def rounds():
            number = 0
            while not over:
                number += 1
                with suppress(IssuerError, AggregatorError):
                    received.append(aggregator.run_round(number, world.weights).received)

        thread = stack.enter_context(ThreadPoolExecutor(1))
        issuer, running_rounds = start(), None
        try:
            devices.wait_ready()
            running_rounds = thread.submit(rounds)
            for kill in range(KILLS):
                time.sleep(random.uniform(1, 4))
                victim = (issuer, fleet)[kill % 2]
                victim.send_signal(signal.SIGKILL)
                victim.communicate()
                if kill % 2 == 0:
                    issuer = start()
                else:
                    pipe = subprocess.PIPE
                    fleet = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            before, deadline = len(received), time.monotonic() + 90
            while 2 not in received[before + 1 :]:
                assert time.monotonic() < deadline, received
                assert not running_rounds.done()
                time.sleep(0.2)
        finally:
            over.append(True)
            if running_rounds is not None:
                running_rounds.result(60)
            for process in (issuer, fleet):
                process.kill()
                process.communicate()
    assert max(received) == 2
    assert set(aggregator.refused) <= {"stale", "unknown_plan"}
