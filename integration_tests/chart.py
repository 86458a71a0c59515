"""Pods of the chart as processes of this machine, from their manifests alone, as a kubelet would run them.

Each container is process 1 of its own, as user and group 10001 without any capability, sees the volumes that it
mounts, read-only where the manifest says so, and is asked by the manifest's probes. It needs root and Linux's
namespaces. Three things are not as in a cluster: mount paths lie below one folder, ports are free ones, and the name
of a Service is 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

import hybrid
from hybrid.local.process import die_with, free_ports

USER = 10001
POLL_S = 0.5
UNCHECKED = ssl._create_unverified_context()  # as a kubelet has it
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_OWN = {"0.0.0.0": "127.0.0.1", "127.0.0.1": "127.0.0.1", "localhost": "localhost"}
_ADDRESS = re.compile(r"(?P<host>[a-z0-9][a-z0-9.-]*):(?P<port>[0-9]{2,5})\b")
_PORT = re.compile(r"^(?P<option>--[\w-]*port=)(?P<port>[0-9]+)$")
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse: SERVING

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """What an image has under a name.

    Attributes:
        words: that start it.
        more: arguments that this machine needs.
        environment: likewise.
    """

    words: tuple[str, ...]
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def why_not() -> str | None:
    """Why pods cannot be run here; None: they can."""
    try:
        done = subprocess.run([*ISOLATED, "setpriv", "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return done.stderr.strip() or None if done.returncode else None


@dataclass
class Cluster:
    """A release, and the machine that it is on.

    Attributes:
        folder: its own.
        objects: the manifests.
        secrets: name -> key -> content.
        outside: HOST:PORT in the values -> HOST:PORT here.
        programs: by name.
        tells: a line for each container that became ready, or ended.
        started: all that ever were.
    """

    folder: Path
    objects: Sequence[Manifest]
    secrets: Mapping[str, Mapping[str, bytes]]
    outside: Mapping[str, str]
    programs: Mapping[str, Program]
    tells: list[str] = field(default_factory=list)
    started: list[Container] = field(default_factory=list)
    _ports: dict[tuple[str, int], int] = field(default_factory=dict)

    def pods(self, component: str) -> list[Pod]:
        """Those of a component; of a job, one."""
        return [
            Pod(
                self,
                f"{each['metadata']['name']}-{ordinal}" if each["kind"] not in _JOBS else each["metadata"]["name"],
                ordinal,
                each,
            )
            for each in self.objects
            if each["kind"] in _WORKLOADS and each["metadata"]["labels"]["app.kubernetes.io/component"] == component
            for ordinal in range(each["spec"].get("replicas", 1))
        ]

    def pod(self, component: str) -> Pod:
        """The first of a component."""
        return self.pods(component)[0]

    def claim(self, name: str) -> Path:
        """The folder of a volume."""
        path = self.folder / "claims" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def port(self, pod: str, number: int) -> int:
        """What stands here for a port of a pod."""
        if (pod, number) not in self._ports:
            (self._ports[pod, number],) = free_ports(1)
        return self._ports[pod, number]

    def address(self, service: str, number: int) -> str | None:
        """HOST:PORT of the first pod behind a port of a Service, or of what is outside; None: neither is known."""
        if found := self.outside.get(f"{service}:{number}"):
            return found
        name = service.partition(".")[0]
        for each in self.objects:
            if each["kind"] == "Service" and each["metadata"]["name"] == name:
                (port,) = (port for port in each["spec"]["ports"] if port["port"] == number)
                headless = each["spec"].get("clusterIP") == "None"
                target = number if headless else port.get("targetPort", number)
                pod = next(pod for pod in self._all_pods() if each["spec"]["selector"].items() <= pod.labels.items())
                return f"127.0.0.1:{self.port(pod.name, pod.number(target))}"
        return None

    def local(self, text: str, pod: str) -> str:
        """What a pod's text says, with this machine's addresses."""

        def replaced(match: re.Match[str]) -> str:
            host, number = match["host"], int(match["port"])
            if host in _OWN:
                return f"{_OWN[host]}:{self.port(pod, number)}"
            return self.address(host, number) or match[0]

        text = _PORT.sub(lambda match: f"{match['option']}{self.port(pod, int(match['port']))}", text)
        return _ADDRESS.sub(replaced, text).replace("0.0.0.0", "127.0.0.1")

    def kill(self) -> None:
        """Whatever runs yet."""
        for container in self.started:
            container.kill()

    def _all_pods(self) -> Iterator[Pod]:
        components = {
            each["metadata"]["labels"]["app.kubernetes.io/component"]: None
            for each in self.objects
            if each["kind"] in _WORKLOADS
        }
        for component in components:
            yield from self.pods(component)


_JOBS = ("Job", "CronJob", "Pod")
_WORKLOADS = ("Deployment", "StatefulSet", *_JOBS)


class Pod:
    """One pod: its volumes, and its containers."""

    def __init__(self, cluster: Cluster, name: str, ordinal: int, workload: Manifest) -> None:
        """Starts nothing."""
        self.cluster, self.name = cluster, name
        spec = workload["spec"]
        spec = spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec
        template = workload if workload["kind"] == "Pod" else spec["template"]
        self.labels = {**template["metadata"]["labels"], "apps.kubernetes.io/pod-index": str(ordinal)}
        self.spec: Manifest = template["spec"]
        self.grace_s: float = self.spec["terminationGracePeriodSeconds"]
        self._templates = {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", ())}
        self.containers = [Container(self, each) for each in self.spec["containers"]]

    def __getitem__(self, name: str) -> Container:
        return next(each for each in self.containers if each.name == name)

    def number(self, port: int | str) -> int:
        """Of a named port."""
        named = {
            each["name"]: each["containerPort"] for one in self.spec["containers"] for each in one.get("ports", ())
        }
        return port if isinstance(port, int) else named[port]

    def start(self) -> None:
        """Runs what comes first to its end, and starts the containers."""
        self._make_volumes()
        for each in self.spec.get("initContainers", ()):
            status, told = Container(self, each).run()
            assert status == 0, f"{self.name}: {each['name']} ended with {status}: {told}"
        for container in self.containers:
            container.start()

    def wait_ready(self) -> None:
        """Returns when every container is."""
        for container in self.containers:
            container.wait_ready()

    def run(self) -> tuple[int, str]:
        """Of a job: its exit status, and what it printed."""
        self.start()
        (container,) = self.containers
        return container.wait_ended(), container.told()

    def stop(self) -> dict[str, int]:
        """SIGTERM to all; how each ended, which it must within the grace."""
        for container in self.containers:
            container.terminate()
        return {
            container.name: container.wait_ended(self.grace_s - container.pre_stop_s) for container in self.containers
        }

    def mounts(self, container: Manifest) -> Iterator[tuple[Path, Path, bool]]:
        """What lies where, and whether it may be written; outer ones first."""
        for mount in sorted(container["volumeMounts"], key=lambda mount: len(mount["mountPath"])):
            index = self.labels["apps.kubernetes.io/pod-index"]
            below = mount.get("subPath", mount.get("subPathExpr", "").replace("$(INDEX)", index))
            source = self._volume(mount["name"]) / below
            assert source.is_dir(), f"{self.name}: {mount} is not there: a kubelet would make it as root's"
            yield (
                source,
                self.cluster.folder / "root" / mount["mountPath"].lstrip("/"),
                not mount.get("readOnly", False),
            )

    def _volume(self, name: str) -> Path:
        if name in self._templates:
            return self.cluster.claim(f"{name}-{self.name}")
        (volume,) = (each for each in self.spec["volumes"] if each["name"] == name)
        if "persistentVolumeClaim" in volume:
            return self.cluster.claim(volume["persistentVolumeClaim"]["claimName"])
        return self.cluster.folder / "pods" / self.name / name

    def _make_volumes(self) -> None:
        """With the group that a kubelet gives them: also files that were there before."""
        for name in {each["name"] for each in self.spec["volumes"]} | self._templates:
            path = self._volume(name)
            path.mkdir(parents=True, exist_ok=True)
            secret = next((each.get("secret") for each in self.spec["volumes"] if each["name"] == name), None)
            if secret is None:
                _give_to_group(path)
            else:
                self._fill(path, secret)

    def _fill(self, path: Path, secret: Manifest) -> None:
        """Links to links, as an update of a Secret replaces all of its files at once."""
        content = self.cluster.secrets[secret["secretName"]]
        items = {each["key"]: each["path"] for each in secret.get("items", ())} or {key: key for key in content}
        data = path / "..data.1"
        data.mkdir(exist_ok=True)
        os.chown(path, 0, USER)
        for key, name in items.items():
            file, top = data / name, Path(name).parts[0]
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            file.write_bytes(content[key])
            file.chmod(secret["defaultMode"])
            os.chown(file, 0, USER)
            if not (path / top).is_symlink():
                (path / top).symlink_to(f"..data/{top}")
        if not (path / "..data").is_symlink():
            (path / "..data").symlink_to(data.name)


class Container:
    """One container of a pod."""

    def __init__(self, pod: Pod, spec: Manifest) -> None:
        """Starts nothing."""
        self.pod, self.spec, self.name = pod, spec, spec["name"]
        self.where = f"{pod.name} {self.name}"
        stop = spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        self.pre_stop_s = float(stop[1])
        self.log = pod.cluster.folder / "logs" / f"{pod.name}.{self.name}.log"
        self._popen: subprocess.Popen[bytes] | None = None
        self._began = self._told = 0.0

    def start(self) -> None:
        """As process 1 of its own."""
        self.log.parent.mkdir(exist_ok=True)
        script = "\n".join(["set -e", "mount --make-rprivate /", *_reachable(self.pod.cluster.folder), *self._binds()])
        privileges = (
            f"setpriv --reuid={USER} --regid={USER} --clear-groups --no-new-privs --bounding-set=-all --pdeathsig=KILL"
        )
        script += f'\ncd {shlex.quote(str(self._path("/tmp")))}\nexec {privileges} -- "$@"'
        self._began, self._told = time.monotonic(), 0.0
        self.pod.cluster.started.append(self)
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [*ISOLATED, "sh", "-c", script, "sh", *self._words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),  # noqa: PLW1509
            )

    def run(self) -> tuple[int, str]:
        """To its end: exit status, and what it printed."""
        self.start()
        return self.wait_ended(), self.told()

    def wait_ready(self) -> None:
        """By its probes, if it has any; each within the time that the manifest gives to the start."""
        probes = [self.spec[kind] for kind in PROBES if kind in self.spec]
        for probe in probes:
            self._await(probe, probes[0].get("failureThreshold", 3) * probes[0].get("periodSeconds", 10))
        self._tell("ready", self._began)

    def pre_stop(self) -> None:
        """What a kubelet has it do before it is told to end."""
        subprocess.run(["sleep", f"{self.pre_stop_s}"], check=True)

    def wrong(self) -> list[str]:
        """What its probes say is, now."""
        return [why for kind in PROBES if kind in self.spec and (why := self._asked(self.spec[kind])) is not None]

    def terminate(self) -> None:
        """As a kubelet does once `preStop` is over."""
        assert self._popen is not None
        assert self._popen.poll() is None, f"{self.where} ended before it was told to: {self.told()[-2000:]}"
        self._told = time.monotonic()
        (first,) = psutil.Process(self._popen.pid).children()
        first.terminate()

    @contextmanager
    def halted(self) -> Iterator[None]:
        """All that it started stands still for the length of a `with` block."""
        assert self._popen is not None
        inside = psutil.Process(self._popen.pid).children(recursive=True)
        for each in inside:
            each.suspend()
        try:
            yield
        finally:
            for each in inside:
                each.resume()

    def wait_ended(self, grace_s: float = 300.0) -> int:
        """Its exit status."""
        assert self._popen is not None
        try:
            status = self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.where} did not end within {grace_s:g} s: {self.told()[-2000:]}") from None
        self._tell(f"ended with {status}", self._told or self._began)
        return status

    def kill(self) -> None:
        """With all that it started."""
        if self._popen is not None and self._popen.poll() is None:
            inside = psutil.Process(self._popen.pid).children(recursive=True)
            for each in inside:
                each.kill()
            self._popen.wait(30)
            psutil.wait_procs(inside, timeout=30)

    def told(self) -> str:
        """What it printed, in all of its lives."""
        return self.log.read_text(errors="replace")

    def url(self, port: int | str, scheme: str = "https") -> str:
        """Of a port of it."""
        return f"{scheme}://127.0.0.1:{self.pod.cluster.port(self.pod.name, self.pod.number(port))}"

    def _tell(self, what: str, since: float) -> None:
        self.pod.cluster.tells.append(f"{self.where}: {what} after {time.monotonic() - since:.1f} s")

    def _await(self, probe: Manifest, within_s: float) -> None:
        assert self._popen is not None
        deadline, why = time.monotonic() + within_s, ""
        while (why := self._asked(probe) or "") and time.monotonic() < deadline:
            assert self._popen.poll() is None, f"{self.where} ended with {self._popen.poll()}: {self.told()[-3000:]}"
            time.sleep(POLL_S)
        assert not why, f"{self.where}: {probe} within {within_s:g} s: {why}; {self.told()[-3000:]}"

    def _asked(self, probe: Manifest) -> str | None:
        """What is wrong."""
        timeout_s = probe.get("timeoutSeconds", 1)
        try:
            if "httpGet" in probe:
                asked = probe["httpGet"]
                headers = {each["name"]: self._local(each["value"]) for each in asked.get("httpHeaders", ())}
                url = self.url(asked["port"], asked.get("scheme", "HTTP").lower()) + asked["path"]
                answer = httpx.get(url, headers=headers, timeout=timeout_s, verify=UNCHECKED, trust_env=False)
                return None if 200 <= answer.status_code < 400 else f"status {answer.status_code}"
            if "grpc" in probe:
                return _health(self.pod.cluster.port(self.pod.name, probe["grpc"]["port"]), timeout_s)
            number = self.pod.number(probe["tcpSocket"]["port"])
            socket.create_connection(("127.0.0.1", self.pod.cluster.port(self.pod.name, number)), timeout_s).close()
        except (OSError, httpx.TransportError, grpc.RpcError) as error:
            return repr(error)
        return None

    @cached_property
    def _program(self) -> Program:
        name = self.spec["command"][0]
        return self.pod.cluster.programs.get(name, Program((name,)))

    @property
    def _words(self) -> list[str]:
        words = [*self.spec["command"][1:], *self.spec.get("args", ())]
        variables = self._variables
        expanded = (re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], str(word)) for word in words)
        return [*self._program.words, *(self._local(word) for word in expanded), *self._program.more]

    @cached_property
    def _variables(self) -> dict[str, str]:
        """Of the manifest, as the pod would see them."""
        found = {}
        for each in self.spec.get("env", ()):
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                found[each["name"]] = self.pod.cluster.secrets[source["secretKeyRef"]["name"]][
                    source["secretKeyRef"]["key"]
                ].decode()
            elif "fieldRef" in source:
                label = re.fullmatch(r"metadata\.labels\['(.*)'\]", source["fieldRef"]["fieldPath"])
                found[each["name"]] = self.pod.labels[label[1]] if label else self.pod.name
            else:
                found[each["name"]] = each["value"]
        return found

    @property
    def _environment(self) -> dict[str, str]:
        """The manifest's, and that of the image."""
        image = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(Path(hybrid.__file__).parents[1]),  # which an image has installed
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",
            "LANG": "C.UTF-8",
            "TMPDIR": str(self._path("/tmp")),
            "HOSTNAME": self.pod.name,
        }
        return (
            image
            | {name: self._local(text) for name, text in self._variables.items()}
            | dict(self._program.environment)
        )

    def _path(self, path: str) -> Path:
        return self.pod.cluster.folder / "root" / path.lstrip("/")

    def _local(self, text: str) -> str:
        """With this machine's addresses and folders."""
        paths = sorted((re.escape(mount["mountPath"]) for mount in self.spec["volumeMounts"]), key=len, reverse=True)
        mounted = re.compile(rf"(?<![\w.-])(?:{'|'.join(paths)})(?![\w.-])")
        return mounted.sub(lambda match: str(self._path(match[0])), self.pod.cluster.local(text, self.pod.name))

    def _binds(self) -> Iterator[str]:
        """Shell commands that put the mounts in their places."""
        root = self.pod.cluster.folder / "root"
        root.mkdir(exist_ok=True)
        yield f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(root))}"
        for source, target, writable in self.pod.mounts(self.spec):
            names = shlex.quote(str(source)), shlex.quote(str(target))
            yield f"mkdir -p {names[1]} && mount --bind {names[0]} {names[1]}"
            if not writable:
                yield f"mount -o remount,bind,ro {names[1]}"


def _reachable(work: Path) -> Iterator[str]:
    """Shell commands that let everybody read the interpreter, where it lies in a folder of root's alone."""
    base = Path(sys.base_prefix).resolve()
    closed = next((each for each in reversed(base.parents) if not each.stat().st_mode & 0o001), None)
    if closed is not None:
        stage = work / "interpreter"
        stage.mkdir(exist_ok=True)
        yield f"mount --bind {shlex.quote(str(base))} {shlex.quote(str(stage))}"
        yield f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(closed))}"
        yield f"mkdir -p {shlex.quote(str(base))}"
        yield f"mount --bind {shlex.quote(str(stage))} {shlex.quote(str(base))}"


def _give_to_group(path: Path) -> None:
    """What `fsGroup` does to a volume: its group may read and write, and owns what is made."""
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            os.chown(each, -1, USER)
            each.chmod(each.stat().st_mode | (0o2770 if each.is_dir() else 0o660))


def _health(port: int, timeout_s: float) -> str | None:
    """What a kubelet's gRPC probe, which knows no TLS, finds wrong."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        answer = check(b"", timeout=timeout_s)
    return None if answer == _SERVING else f"not serving: {answer!r}"
