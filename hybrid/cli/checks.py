"""What `hybrid doctor` looks at: the checks of `hybrid.doctor`, and those that need the other packages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import ConfigError, HybridError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.doctor.findings import Check, Finding
    from hybrid.local.supervisor import State
    from hybrid.registry import Registry
    from hybrid.spec import HybridModel
    from serving.connection import Broker, TritonAddress
    from serving.probing import Topic

NAMES = (
    "stack",
    "registry",
    "ledgers",
    "permissions",
    "pairs",
    "features",
    "redis",
    "kafka",
    "triton",
    "gateway",
    "superlink",
    "aggregators",
    "issuer",
    "clocks",
)
OLD = 0.8  # of the age that features may have
MIGRATE = "run `hybrid migrate`"


@dataclass(frozen=True)
class Servers:
    """What is to be asked, and where it is; None and empty: not there, or nobody said where.

    Attributes:
        kafka, triton: of serving.
        gateway: its base URL.
        superlink: HOST:PORT of Flower's.
        aggregators: base URLs.
        issuer: base URL of the issuer of tokens.
        ca: a PEM file of who signed the certificates of the last four.
    """

    kafka: Broker | None = None
    triton: TritonAddress | None = None
    gateway: str | None = None
    superlink: str | None = None
    aggregators: tuple[str, ...] = ()
    issuer: str | None = None
    ca: Path | None = None


def checks(workspace: Workspace, servers: Servers, state: State | None) -> list[Check]:
    """Every check, in the order of NAMES."""
    from hybrid.doctor.findings import Check
    from hybrid.doctor.ledgers import RESTORE, ledgers
    from hybrid.doctor.pairs import pairs
    from hybrid.doctor.permissions import permissions
    from hybrid.doctor.servers import SYNC, clocks
    from hybrid.registry import Registry

    bases = {"gateway": servers.gateway, "issuer": servers.issuer}
    healths = {name: [base] if base else [] for name, base in bases.items()} | {"aggregators": [*servers.aggregators]}
    urls = [_endpoint(name, base) for name, found in healths.items() for base in found]
    urls += [f"https://{servers.superlink}/health"] if servers.superlink else []
    tell_time = [_kafka_clock(servers.kafka)] if servers.kafka else []
    mlflow = os.environ.get("MLFLOW_TRACKING_URI", "")
    look: dict[str, tuple[Callable[[], Iterable[Finding]], str]] = {
        "stack": (lambda: _stack(state), "`hybrid down`, then `hybrid up`"),
        "registry": (lambda: _registry(Registry(workspace)), "start what MLFLOW_TRACKING_URI names, or correct it"),
        "ledgers": (lambda: ledgers(workspace.runs), RESTORE),
        "permissions": (lambda: permissions(workspace), "give the workspace to the account that runs `hybrid`"),
        "pairs": (lambda: pairs(workspace, Registry(workspace)), "mend the registry first, see its finding"),
        "features": (
            lambda: _features(workspace),
            "`hybrid features apply MODEL`, `hybrid features materialize MODEL`",
        ),
        "redis": (lambda: _redis(workspace), "start Redis, open its port for this machine, or `hybrid features store`"),
        "kafka": (lambda: _kafka(servers.kafka), "start Kafka, open its port for this machine, or correct --kafka..."),
        "triton": (
            lambda: _triton(servers.triton, workspace),
            "start Triton, open its gRPC port for this machine, or correct --triton...",
        ),
        "gateway": (lambda: _healths("gateway", healths, servers.ca), "correct --gateway"),
        "superlink": (lambda: _superlink(servers), "correct --superlink"),
        "aggregators": (lambda: _healths("aggregators", healths, servers.ca), "correct --aggregator"),
        "issuer": (lambda: _healths("issuer", healths, servers.ca), "correct --issuer"),
        "clocks": (
            lambda: clocks([*urls, *([mlflow] if mlflow.startswith("http") else [])], tell_time, servers.ca),
            SYNC,
        ),
    }
    return [Check(name, *look[name]) for name in NAMES]


def stack_state(workspace: Workspace) -> State | None:
    """What the local stack does; None where it is down, or its libraries are not installed, as in a cluster."""
    if not (workspace.stack / "state.json").exists():
        return None
    try:
        from hybrid.local import stack
    except ImportError:
        return None
    return stack.status(workspace)


def with_stack(given: Servers, state: State | None) -> Servers:
    """With the local stack's servers, if it is up, where nobody said others."""
    from serving.connection import Broker, TritonAddress

    if state is None or state.phase != "ready":
        return given
    ports = {use: port for server in state.servers for use, port in server.ports.items()}
    return replace(
        given,
        kafka=given.kafka or Broker(f"127.0.0.1:{ports['kafka']}"),
        triton=given.triton or TritonAddress(f"127.0.0.1:{ports['triton-grpc']}"),
        gateway=given.gateway or f"http://127.0.0.1:{ports['gateway']}",
    )


def _finding(check: str, status: str, found: str, fix: str = "") -> Finding:
    from hybrid.doctor.findings import Finding

    assert status in ("ok", "warn", "fail", "skipped")
    return Finding(check, status, found, fix)  # type: ignore[arg-type]


def _stack(state: State | None) -> Iterator[Finding]:
    if state is None:
        yield _finding("stack", "skipped", "the local stack is down")
    elif state.phase == "ready":
        yield _finding("stack", "ok", f"the local stack is up: {', '.join(server.name for server in state.servers)}")
    else:
        why = state.message.partition("\n")[0]
        fix = "`hybrid down`, then `hybrid up`; the logs are in the workspace's stack/logs"
        yield _finding("stack", "fail", f"the local stack is {state.phase}{f': {why}' if why else ''}", fix)


def _registry(registry: Registry) -> Iterator[Finding]:
    """Whether it answers, its tables, and whether each model can be built from its file."""
    from hybrid.tracking import revisions

    name = "registry"
    own = registry.database.exists()
    if registry.is_own_file and own:
        found, expected = revisions(registry.database)
        if found != expected:
            yield _finding(name, "fail", f"MLflow's tables in {registry.where} are of another MLflow", MIGRATE)
            return
    if not registry.is_own_file and own:
        text = f"MLFLOW_TRACKING_URI is set: versions in the workspace's own {registry.database.name} are not seen"
        yield _finding(name, "warn", text, "unset it to use those; if they are not needed, move the file away")
    if registry.is_plaintext:
        text = f"{registry.where} is spoken to in plaintext: weights and passwords can be read on the way, and changed"
        yield _finding(name, "warn", text, "https:// in MLFLOW_TRACKING_URI, or a service mesh that encrypts")
    registry.check()
    names = registry.names()
    yield _finding(name, "ok", f"{registry.where} answers; {len(names)} registered: {', '.join(names) or 'nothing'}")
    for model in names:
        try:
            registry.load_model(model)
        except HybridError as error:
            fix = f"`hybrid register FILE` where {model}'s file is; until then it cannot be trained, nor promoted"
            yield _finding(name, "warn", str(error), fix)


def _features(workspace: Workspace) -> Iterator[Finding]:
    """The newest row of each registered model; of one that is served, it must be there."""
    from hybrid.registry import Registry

    registry = Registry(workspace)
    served = {file.stem for file in workspace.deployments.glob("*.json")}
    names = registry.names()
    if not names:
        yield _finding("features", "skipped", "no model is registered")
    for name in names:
        try:
            model = registry.load_model(name)
        except (ConfigError, NotFound) as error:
            yield _finding(
                "features", "warn", str(error), "see the registry's finding; its features were not looked at"
            )
            continue
        yield _newest(model, workspace.feast, served=name in served)


def _newest(model: HybridModel, folder: Path, *, served: bool) -> Finding:
    from feature_store.probing import newest

    refresh = (
        f"`hybrid features materialize {model.name}`, by a schedule more often than {model.server.max_feature_age}"
    )
    anew = f"`hybrid features apply {model.name}`, then `hybrid features materialize {model.name}`"
    bad = "fail" if served else "warn"
    try:
        found = newest(model, folder, datetime.now(UTC))
    except ConfigError as error:
        return _finding("features", bad, f"{model.name}: {error}", anew)
    age = f"{model.name}: the newest of {found.rows} rows is {_duration(found.age_s)} old, at most "
    age += f"{_duration(found.max_age_s)} is allowed"
    if found.status == "stale_features":
        return _finding("features", bad, age, refresh)
    if found.status != "ok":
        text = f"{model.name}: what was materialised is not what the online store gives ({found.status})"
        return _finding("features", bad, text, anew)
    if found.age_s > OLD * found.max_age_s:
        return _finding("features", "warn", age, refresh)
    return _finding("features", "ok", age)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _redis(workspace: Workspace) -> Iterator[Finding]:
    from feature_store.definitions import OnlineStore
    from feature_store.probing import ask_redis

    online = OnlineStore.read(workspace.feast)
    if online.kind != "redis":
        yield _finding("redis", "skipped", "features are served from SQLite, a file of the workspace")
        return
    found = ask_redis(online)
    if found.evicts:
        text = f"{online.address} drops rows when its memory is full (maxmemory-policy {found.policy})"
        yield _finding("redis", "warn", text, "CONFIG SET maxmemory-policy noeviction, and give it enough memory")
    yield _finding("redis", "ok", f"{online.address}, database {online.database}, answers in {found.answer_ms:.1f} ms")


def _kafka(broker: Broker | None) -> Iterator[Finding]:
    """Topics as serving makes them, a worker for them, and a record there and back."""
    if broker is None:
        yield _finding("kafka", "skipped", "--kafka says where it is; the local stack is down")
        return
    from serving.probing import topics, workers

    if not broker.private:
        text = f"{broker.bootstrap} is spoken to in plaintext: device embeddings can be read on the way"
        yield _finding("kafka", "warn", text, "--kafka-tls, here and for gateway and workers")
    found = topics(broker)
    for name, topic in found.items():
        if topic is None:
            fix = "`hybrid migrate --kafka ...`, or start a gateway or worker that may create topics"
            yield _finding("kafka", "fail", f"the topic {name} is absent", fix)
        else:
            yield from _topic(name, topic)
    yield from _workers(found, workers(broker))
    yield _round_trip(broker)


def _round_trip(broker: Broker) -> Finding:
    from serving.probing import DOCTOR, DOCTOR_CONFIG, round_trip

    try:
        trip = round_trip(broker)
    except ConfigError as error:  # else the topics could not have been asked for
        configs = ", ".join(f"{name}={value}" for name, value in DOCTOR_CONFIG.items())
        fix = f"create {DOCTOR} with 1 partition and {configs}, and let this client write and read it"
        return _finding("kafka", "warn", f"no record was sent: {error}", fix)
    return _finding("kafka", "ok", f"a record went to {broker.bootstrap} and back in {trip.took_ms:.0f} ms")


def _topic(name: str, topic: Topic) -> Iterator[Finding]:
    from serving.topics import PARTITIONS

    if topic.partitions == 0:
        yield _finding("kafka", "skipped", f"{name}: this client may not look at it")
    elif topic.partitions < PARTITIONS[name]:
        text = f"{name} has {topic.partitions} partitions, at least {PARTITIONS[name]} are counted on"
        yield _finding("kafka", "fail", text, f"kafka-topics --alter --topic {name} --partitions {PARTITIONS[name]}")
    if topic.behind:
        text = f"{name}: replicas of {topic.behind} of {topic.partitions} partitions are not in sync"
        yield _finding("kafka", "warn", text, "look at the brokers: one is down or slow")
    for setting, (is_now, wanted) in topic.differences(name).items():
        fix = f"kafka-configs --alter --topic {name} --add-config {setting}={wanted}, unless it is meant"
        yield _finding("kafka", "warn", f"{name}: {setting} is {is_now}, serving makes it with {wanted}", fix)


def _workers(found: Mapping[str, Topic | None], count: int | None) -> Iterator[Finding]:
    from hybrid.messages import DeviceEmbeddings

    requests = found[DeviceEmbeddings.TOPIC]
    if count is None or requests is None or requests.partitions == 0:
        return
    if count == 0:
        text = "no merge worker is in the group: nobody answers requests that go through Kafka"
        yield _finding("kafka", "warn", text, "start `python -m serving worker`, or look into its log")
    elif (idle := count - requests.partitions) > 0:
        text = f"{count} merge workers for {requests.partitions} partitions of requests: {idle} do nothing"
        fix = f"kafka-topics --alter --topic {DeviceEmbeddings.TOPIC} --partitions {count}, or start fewer"
        yield _finding("kafka", "warn", text, fix)
    else:
        text = f"{count} merge worker{'s' * (count > 1)} for {requests.partitions} partitions of requests"
        yield _finding("kafka", "ok", text)


def _kafka_clock(broker: Broker) -> Callable[[], tuple[str, float]]:
    def tell() -> tuple[str, float]:
        from serving.probing import round_trip

        return f"Kafka's broker at {broker.bootstrap}", round_trip(broker).skew_s

    return tell


def _triton(address: TritonAddress | None, workspace: Workspace) -> Iterator[Finding]:
    """Ready, with both models of each version that is served."""
    if address is None:
        yield _finding("triton", "skipped", "--triton says where it is; the local stack is down")
        return
    from hybrid.deployment import Window
    from serving.probing import loaded

    served = [version for window in Window.read_all(workspace.deployments).values() for version in window.versions]
    models = [(part, version.version) for version in served for part in (version.server_tower, version.head)]
    ready, absent = loaded(address, models)
    for model, version in absent:
        fix = "give Triton this workspace's model repository; its log says why a model in it is not loaded"
        yield _finding("triton", "fail", f"{model} version {version} is served, and Triton has not loaded it", fix)
    if not ready:
        fix = "its log says which model of its repository does not load"
        yield _finding("triton", "fail", f"{address.address} answers that it is not ready", fix)
    elif not absent:
        yield _finding(
            "triton", "ok", f"{address.address} is ready, with {len(models)} models of {len(served)} versions"
        )


def _endpoint(name: str, base: str) -> str:
    return f"{base.rstrip('/')}{'/v2/health/ready' if name == 'gateway' else '/health'}"


def _healths(name: str, servers: Mapping[str, Sequence[str]], ca: Path | None) -> Iterator[Finding]:
    from hybrid.doctor.servers import health

    option = "aggregator" if name == "aggregators" else name
    if not servers[name]:
        yield _finding(name, "skipped", f"--{option} says where it is")
    for base in servers[name]:
        fix = f"start it, or look into its log; or correct --{option}"
        yield from health(name, _endpoint(name, base), fix, ca)


def _superlink(servers: Servers) -> Iterator[Finding]:
    from hybrid.doctor.servers import superlink

    if servers.superlink is None:
        yield _finding("superlink", "skipped", "--superlink says where it is")
    else:
        yield from superlink("superlink", servers.superlink, servers.ca)
