"""A Flower federation on this machine: a SuperLink, and SuperNodes in front of aggregators.

These simulate their people for `LocalFlower`, and front devices for `hybrid.local.fleet`.

Every connection is TLS, with certificates made for one training; SuperNodes
show keys that were registered before; what runs apps asks with a shared secret.
Nothing of it outlives the training, or us.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import numpy as np

from hybrid.bearer import new_token
from hybrid.errors import FederationError, NotFound, StackError
from hybrid.features import Float32
from hybrid.federation.flower_app import DONE, Job, Progress
from hybrid.federation.parts import RELEASE, Budget, Part, write_rows
from hybrid.federation.superlink import SuperLink, environment
from hybrid.federation.training import Outcome, Rounds
from hybrid.local.process import Process, Service, free_ports, http_ok, is_running, log_has
from hybrid.privacy.ledger import FILE as LEDGER
from hybrid.privacy.ledger import Ledger

RESTARTS = 9  # of a server that does not live for long
APP_RESTARTS = 5  # of a ServerApp, without a round in between
SETTLED_S = 10.0  # after which it did
LONGEST_WAIT_S = 15.0  # before a restart
START_TIMEOUT_S = 120.0
APP_TIMEOUT_S = 60.0  # of a ServerApp's start
ROUND_TIMEOUT_S = 180.0
_POLL_S = 0.2


@dataclass(frozen=True)
class LocalFlower:
    """A `hybrid.federation.training.Federation` of processes on this machine.

    What dies is started again, and goes on from what it kept in files. A SuperNode
    costs its people's share of a round or two, an aggregator at most that of the
    last round (docs/decisions/0026).

    Attributes:
        model_file: the team's.
        aggregators: how many, each with a SuperNode of its own and an equal share of the people; >= 1.
        say: is told what happens.
        round_timeout_s: after which a round goes on without those that did not answer.
    """

    model_file: Path
    aggregators: int = 2
    say: Callable[[str], None] = field(default=lambda _: None, repr=False)
    round_timeout_s: float = ROUND_TIMEOUT_S
    name = "local"
    assumption = (
        "simulated devices, whose coins repeat with the seed (it is in the run's config.json); noise is from the "
        "operating system, of each aggregator for its own people, so that the largest of their epsilons is "
        "everybody's; per run: repeats and tuning are not composed"
    )

    def train(self, rounds: Rounds, after: Callable[[int, Float32], None]) -> Outcome:
        """See `hybrid.federation.training.Federation`."""
        job = Job(
            rounds=rounds.settings.rounds,
            planned_cohort=rounds.planned_cohort,
            training=rounds.settings,
            nodes=self.aggregators,
            start_timeout_s=START_TIMEOUT_S,
            round_timeout_s=self.round_timeout_s,
        )
        simulated = _Simulated(self, rounds)
        failed = run_job(rounds.folder, job, rounds.initial, simulated, after=after, say=self.say, done=rounds.done)
        return Outcome(_last_clip(rounds), failed)


@dataclass(frozen=True)
class Site:
    """Where one aggregator of a federation is.

    Attributes:
        folder: its own. Of what is in it, only its ledger outlives the federation.
        token: the file with what its control side is to ask for.
        port: of its control side, TCP on loopback.
        certificate: of that, chain and key; of the authority that all processes of the federation trust.
    """

    folder: Path
    token: Path
    port: int
    certificate: tuple[Path, Path]


class Aggregators(Protocol):
    """What stands behind the SuperNodes."""

    def write(self, index: int, site: Site) -> None:
        """Writes what the process of one of them reads."""
        ...

    def command(self, index: int, site: Site) -> Sequence[str]:
        """Runs it, with a control side (`hybrid.federation.remote`), until SIGTERM."""
        ...


def run_job(
    folder: Path,
    job: Job,
    initial: Float32,
    aggregators: Aggregators,
    *,
    after: Callable[[int, Float32], None],
    say: Callable[[str], None],
    done: int = 0,
    beside: AbstractContextManager[object] | None = None,
) -> int:
    """Runs a job's rounds on servers of its own; once it is over, ledgers and logs are left.

    Args:
        folder: of the federation; of one that goes on, with what was left there.
        job: how many rounds, on how many nodes.
        initial: (p,) the weights to start from.
        aggregators: one behind each node.
        after: called with each round's number and the weights after it; first with 0 and the initial ones.
        say: is told what happens.
        done: rounds that were handed on before.
        beside: entered when all servers are ready, before the first round, and left after the last one.

    Returns:
        In how many rounds no node answered.

    Raises:
        FederationError: it ended before the last round.
    """
    servers = _Servers(folder, job.nodes)
    follower = _Follower(Progress(servers.job), done, after)
    try:
        failed = follower.failed_rounds()
        if failed is None:
            _prepare(servers, job, initial, aggregators, done)
            with _running(servers, aggregators, say) as keeper, beside or nullcontext():
                app = _App(servers, say)
                app.start()
                failed = _follow(follower, keeper, app)
        _remove_done(servers)
        return failed
    except StackError as error:
        raise FederationError(str(error)) from None
    finally:
        _remove_private(servers)


@dataclass(frozen=True)
class _Simulated:
    """Aggregators that simulate their share of the people."""

    flower: LocalFlower
    rounds: Rounds

    def write(self, index: int, site: Site) -> None:
        rounds, how, of = self.rounds, self.rounds.round, self.flower.aggregators
        write_rows(site.folder, rounds.examples, index, of)
        np.savez(site.folder / "network.npz", **rounds.network.weights())  # type: ignore[arg-type]
        part = Part(
            model_file=self.flower.model_file,
            folder=site.folder,
            index=index,
            of=of,
            population=rounds.examples.users,
            seed=rounds.seed,
            attempts_before=rounds.attempts_before,
            training=rounds.settings,
            device=rounds.device,
            sampling=how.sampling,
            clip=how.clip,
            noise_multiplier=how.noise_multiplier,
            quantile=how.quantile,
            planned_cohort=rounds.planned_cohort / of,
            budget=None if rounds.delta is None else Budget(delta=rounds.delta, rounds=rounds.settings.rounds),
            port=site.port,
            certificate=site.certificate[0],
            key=site.certificate[1],
        )
        (site.folder / "part.json").write_text(part.model_dump_json(indent=2))

    def command(self, index: int, site: Site) -> Sequence[str]:
        return [sys.executable, "-P", "-m", "hybrid.local", "aggregate", str(site.folder / "part.json")]


@dataclass(frozen=True)
class _Servers:
    """Where everything of one federation is.

    Attributes:
        folder: of the federation.
        count: of aggregators, and of SuperNodes.
        superlink: its TCP port.
        aggregators, supernodes: theirs, in order.
    """

    folder: Path
    count: int
    superlink: int = field(init=False)
    aggregators: tuple[int, ...] = field(init=False)
    supernodes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        superlink, *others = free_ports(1 + 2 * self.count)
        object.__setattr__(self, "superlink", superlink)
        object.__setattr__(self, "aggregators", tuple(others[: self.count]))
        object.__setattr__(self, "supernodes", tuple(others[self.count :]))

    @property
    def job(self) -> Path:
        return self.folder / "job"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.folder / "flwr"

    @property
    def control(self) -> SuperLink:
        """What registers SuperNodes and begins runs."""
        return SuperLink(f"127.0.0.1:{self.superlink}", self.keys / "ca.pem", self.environment())

    def aggregator(self, index: int) -> Path:
        return self.folder / f"aggregator-{index + 1}"

    def site(self, index: int) -> Site:
        folder, certificate = self.aggregator(index), (self.keys / "server.pem", self.keys / "server.key")
        return Site(folder, folder / "token", self.aggregators[index], certificate)

    def environment(self) -> dict[str, str]:
        """Of Flower's processes: no telemetry, no look for updates, no proxy in front of this machine."""
        return {
            **environment(self.home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


def _prepare(servers: _Servers, job: Job, initial: Float32, aggregators: Aggregators, done: int) -> None:
    """Writes all that the processes read; of a training that goes on, what they had written stays.

    Raises:
        FederationError: what they had written is not that of the training.
    """
    _remove_private(servers)
    if servers.logs.exists():
        servers.logs.rename(servers.logs.with_name(f"logs.{len(list(servers.folder.glob('logs*')))}"))
    for folder in (servers.job, servers.keys, servers.home):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_kept(servers, done)
    _write_certificates(servers.keys)
    for index in range(servers.count):
        site = servers.site(index)
        site.folder.mkdir(mode=0o700, exist_ok=True)
        new_token(site.token)
        aggregators.write(index, site)
    for name in ("superlink", *(f"supernode-{index + 1}" for index in range(servers.count))):
        _write_secret(servers.keys / f"{name}.secret", secrets.token_bytes(32))
    if not done:  # else they are not the initial ones
        np.save(servers.job / "initial.npy", initial)
    (servers.job / "job.json").write_text(job.model_dump_json(indent=2))


def _check_kept(servers: _Servers, done: int) -> None:
    """Raises: FederationError: it is of fewer rounds, or of other aggregators, whose ledgers others' people are in."""
    kept, others = Progress(servers.job).kept(), servers.aggregator(servers.count)
    here = 0 if kept is None else kept.step
    if here < done:
        raise FederationError(
            f"{servers.job} must hold the {done} rounds that the run's checkpoint has, got {here}: start another run"
        )
    if kept is not None and (others.exists() or not servers.aggregator(servers.count - 1).exists()):
        count = len(list(servers.folder.glob("aggregator-*")))
        raise FederationError(f"aggregators must stay the {count} that the training began with, got {servers.count}")


def _stages(servers: _Servers, aggregators: Aggregators) -> tuple[Sequence[Service], ...]:
    """Started in this order; those of one stage together."""
    indices = range(servers.count)
    return (
        (_superlink(servers), *(_aggregator(servers, index, aggregators) for index in indices)),
        (_superexec(servers, "superlink", servers.superlink), *(_supernode(servers, index) for index in indices)),
        tuple(_superexec(servers, f"supernode-{index + 1}", servers.supernodes[index]) for index in indices),
    )


def _aggregator(servers: _Servers, index: int, aggregators: Aggregators) -> Service:
    site = servers.site(index)
    return Service(
        name=f"aggregator-{index + 1}",
        command=aggregators.command(index, site),
        ready=http_ok(f"https://127.0.0.1:{site.port}/health", authority=servers.keys / "ca.pem"),
        ports={"control": site.port},
    )


def _superlink(servers: _Servers) -> Service:
    port = servers.superlink
    return Service(
        name="superlink",
        command=[
            *(_script("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
            *_tls(servers),
            *("--enable-supernode-auth", "--database", str(servers.folder / "superlink.db")),
            # What hybrid-towers needs is installed; without this each app would be given an environment of its own.
            *("--isolation", "process", "--disable-runtime-dependency-installation"),
            *("--superexec-auth-secret-file", str(servers.keys / "superlink.secret")),
        ],
        ready=log_has(".*Uvicorn running on .*"),
        ports={"superlink": port},
        environment=servers.environment(),
    )


def _supernode(servers: _Servers, index: int) -> Service:
    name, port = f"supernode-{index + 1}", servers.supernodes[index]
    config = {
        "aggregator": f"https://127.0.0.1:{servers.aggregators[index]}",
        "token": str(servers.site(index).token),
        "authority": str(servers.keys / "ca.pem"),
    }
    return Service(
        name=name,
        command=[
            *(_script("flower-supernode"), "--superlink", f"127.0.0.1:{servers.superlink}"),
            *("--root-certificates", str(servers.keys / "ca.pem")),
            *("--auth-supernode-private-key", str(servers.keys / name)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *_tls(servers),
            *("--isolation", "process", "--superexec-auth-secret-file", str(servers.keys / f"{name}.secret")),
            *("--node-config", " ".join(f'{key}="{value}"' for key, value in config.items())),
        ],
        ready=log_has(".*SuperNode ID: .*"),
        ports={"runtime": port},
        environment=servers.environment(),
        prepare=lambda: _register(servers, name),
    )


def _register(servers: _Servers, name: str) -> None:
    """Gives a SuperNode a key that the SuperLink knows.

    A new one at each start: one that died is taken for alive for a minute, in which its key is refused and each
    round waits for it; so it is unregistered, and its round goes on without it.
    """
    for log in servers.logs.glob(f"{name}.*.log"):
        for node in re.findall(r"SuperNode ID: (\d+)", log.read_text(errors="replace")):
            servers.control.unregister(node)
        log.rename(log.with_suffix(".old"))
    _write_node_key(servers.keys / name)
    servers.control.register(servers.keys / f"{name}.pub")


def _superexec(servers: _Servers, whose: str, port: int) -> Service:
    """What starts the apps' processes for a SuperLink or a SuperNode."""
    return Service(
        name=f"{whose}-apps",
        command=[
            *(sys.executable, "-P", "-m", "hybrid.local", "superexec"),
            *("--runtime-api-address", f"127.0.0.1:{port}"),
            *("--root-certificates", str(servers.keys / "ca.pem")),
            *("--superexec-auth-secret-file", str(servers.keys / f"{whose}.secret")),
        ],
        ready=lambda _log: True,
        environment=servers.environment(),
    )


def _tls(servers: _Servers) -> list[str]:
    files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
    return [word for option, name in files.items() for word in (f"--ssl-{option}", str(servers.keys / name))]


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


class _Keeper:
    """Keeps servers running."""

    def __init__(self, servers: _Servers, say: Callable[[str], None]) -> None:
        self._servers, self._say = servers, say
        self._processes: dict[str, Process] = {}
        self._since: dict[str, float] = {}
        self._deaths: dict[str, int] = {}  # since it last lived for long
        self._due: dict[str, float] = {}  # of those that are down: when to start them

    def start(self, stage: Sequence[Service]) -> None:
        """Returns when all of the stage is ready."""
        for service in stage:
            self._start(service)
        for service in stage:
            self._processes[service.name].wait_ready()

    def check(self) -> None:
        """Starts again what died, later each time: a SuperLink takes a SuperNode for alive a minute longer.

        Raises:
            StackError: it dies again and again.
        """
        for name, process in self._processes.items():
            if name in self._due:
                if time.monotonic() >= self._due[name]:
                    self._start_again(name, process.service)
            elif process.exit_status() is not None:
                told = process.obituary()
                process.stop()  # what it started, too
                if time.monotonic() - self._since[name] > SETTLED_S:
                    self._deaths[name] = 0
                self._put_off(name, told)

    def _start(self, service: Service) -> None:
        self._processes[service.name] = Process(service, self._servers.logs)
        self._since[service.name] = time.monotonic()

    def _start_again(self, name: str, service: Service) -> None:
        log = self._servers.logs / f"{name}.log"
        if log.exists():
            log.rename(log.with_name(f"{name}.{len(list(self._servers.logs.glob(f'{name}.*')))}.log"))
        try:
            self._start(service)
        except (StackError, FederationError) as error:  # what it needs may itself be down for a moment
            self._put_off(name, str(error))
        else:
            del self._due[name]
            if name.startswith("supernode") and (apps := self._processes.get(f"{name}-apps")) is not None:
                apps.stop()  # it would look for the new one in up to 20 s only
                self._start(apps.service)

    def _put_off(self, name: str, told: str) -> None:
        deaths = self._deaths[name] = self._deaths.get(name, 0) + 1
        if deaths > RESTARTS:
            raise StackError(told)
        wait_s = min(2.0 ** (deaths - 1), LONGEST_WAIT_S)
        self._due[name] = time.monotonic() + wait_s
        self._say(f"{told.split(';', maxsplit=1)[0]}; it is started again in {wait_s:g} s")

    def stop(self) -> None:
        """Last started first."""
        for process in reversed(self._processes.values()):
            process.stop()


class _App:
    """Keeps a ServerApp running: one Flower run after another, each going on where the one before was killed."""

    def __init__(self, servers: _Servers, say: Callable[[str], None]) -> None:
        self._servers, self._say, self._progress = servers, say, Progress(servers.job)
        self._run, self._since = "", 0.0
        self._due: float | None = None  # where none runs: when to start one
        self._done, self._deaths = -1, 0  # since that round

    def start(self) -> None:
        """Begins a Flower run.

        Raises:
            FederationError: the SuperLink does not take it.
        """
        self._progress.expect()
        self._run, self._since = self._servers.control.run(self._servers.job), time.monotonic()

    def check(self, done: int) -> None:
        """Starts it again where it died.

        Args:
            done: rounds that are over.

        Raises:
            FederationError: it dies again and again, and no round is over in between.
        """
        if self._due is not None:
            if time.monotonic() < self._due:
                return
            self._due = None
            try:
                self.start()
            except FederationError as error:  # the SuperLink may itself be down for a moment
                self._put_off(str(error), done)
        elif (process := self._progress.process()) is not None:
            if not is_running(*process):
                self._put_off("the ServerApp ended before its last round", done)
        elif time.monotonic() - self._since > APP_TIMEOUT_S:
            self._put_off(f"the ServerApp did not start within {APP_TIMEOUT_S:g} s", done)

    def _put_off(self, told: str, done: int) -> None:
        self._deaths = self._deaths + 1 if done == self._done else 1
        self._done = done
        if self._deaths > APP_RESTARTS:
            raise FederationError(f"{told}, {self._deaths} times; {_told(self._servers, self._run)}")
        wait_s = min(2.0 ** (self._deaths - 1), LONGEST_WAIT_S)
        self._due = time.monotonic() + wait_s
        self._say(f"{told.splitlines()[0]}; it is started again in {wait_s:g} s")


@contextmanager
def _running(servers: _Servers, aggregators: Aggregators, say: Callable[[str], None]) -> Iterator[_Keeper]:
    """All servers, ready."""
    keeper = _Keeper(servers, say)
    try:
        first, second, third = _stages(servers, aggregators)
        say(f"Starting a SuperLink, {servers.count} aggregators and their SuperNodes; logs: {servers.logs}")
        keeper.start(first)
        keeper.start(second)
        keeper.start(third)
        yield keeper
    finally:
        keeper.stop()


@dataclass
class _Follower:
    """Hands on the weights after each round, once.

    Attributes:
        progress: of the ServerApp.
        done: rounds that were handed on.
        after: takes them.
    """

    progress: Progress
    done: int
    after: Callable[[int, Float32], None]

    def failed_rounds(self) -> int | None:
        """Hands on what there is; in how many rounds no node answered, or None where more will come."""
        failed = self.progress.failed_rounds()
        for number, flat in self.progress.take(self.done):
            self.after(number, flat)
            self.done = number
        return failed


def _follow(follower: _Follower, keeper: _Keeper, app: _App) -> int:
    """Returns, after the last round, in how many no node answered.

    Raises:
        FederationError, StackError: the ServerApp, or another process, dies again and again.
    """
    while (failed := follower.failed_rounds()) is None:
        app.check(follower.done)
        keeper.check()
        time.sleep(_POLL_S)
    return failed


def _told(servers: _Servers, run: str) -> str:
    """The end of what the ServerApp logged."""
    try:
        lines = servers.control.log(run).splitlines()[-15:]
    except FederationError as error:
        return str(error)
    return "\n".join(["its last lines:", *(f"  {line}" for line in lines)])


def _last_clip(rounds: Rounds) -> float:
    """The largest that an aggregator's last release was clipped to."""
    clips = []
    for folder in rounds.folder.glob("aggregator-*"):
        try:
            entries = Ledger.read(folder).entries
        except NotFound:
            continue
        clips += [entry.clip for entry in entries[-1:]]
    return max(clips, default=rounds.round.clip)


def _remove_private(servers: _Servers) -> None:
    """Leaves ledgers, logs, and what a training goes on from, sums with their noise among it.

    No key, no token, no row of anybody's.
    """
    for folder in (servers.keys, servers.home):
        shutil.rmtree(folder, ignore_errors=True)
    for file in servers.folder.glob("superlink.db*"):
        file.unlink()
    for index in range(servers.count):
        for item in servers.aggregator(index).glob("*"):
            if item.is_dir() and item.name != RELEASE:
                shutil.rmtree(item, ignore_errors=True)
            elif item.is_file() and item.name != LEDGER:
                item.unlink()


def _remove_done(servers: _Servers) -> None:
    """Of a training that is over, ledgers, logs, and that it is over, stay."""
    for index in range(servers.count):
        shutil.rmtree(servers.aggregator(index) / RELEASE, ignore_errors=True)
    for item in servers.job.glob("*"):
        if item.name != DONE:
            item.unlink()


def _write_certificates(folder: Path) -> None:
    """An authority of this federation alone, and one certificate for all that listens on loopback."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hybrid local federation")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )

    now, authority, server = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1()), None
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    own = (
        builder("hybrid local federation", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .sign(authority, hashes.SHA256())
    )
    server = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        builder("localhost", server)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority, hashes.SHA256())
    )
    from cryptography.hazmat.primitives import serialization

    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "ca.pem").write_bytes(own.public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate.public_bytes(pem))
    _write_secret(folder / "server.key", server.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def _write_node_key(file: Path) -> None:
    """A SuperNode's key, as OpenSSH writes them, and its public half in `<file>.pub`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, form = ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
    _write_secret(file, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    file.with_name(f"{file.name}.pub").write_bytes(public)


def _write_secret(file: Path, content: bytes) -> None:
    """For its owner only."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(content)
