"""`python -m helm.tools.cluster` installs the chart on a real API server: admitted, upgraded, rolled back, removed.

There is an API server with its storage and nothing behind it: no kubelet runs a
pod and no controller makes one. So each pod that an object asks for is submitted
as a pod of its own, by a dry run, in a namespace that enforces Kubernetes'
standard "restricted": its admission judges what it would else only warn of.

Every file of `ci` goes through the whole life of a release, first without the
custom kinds of `crds-for-tests` and then with them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import secrets
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from helm.tools import install, manifests
from helm.tools.check import RELEASE, Chart, Finding, Result, previous_chart, show
from helm.tools.manifests import Manifest
from hybrid.errors import ConfigError, HybridError, StackError
from hybrid.local.process import Service, default_cache, free_ports, http_ok, running

_HELM_S = 60.0  # no command needs more: nothing is waited for
_ESTABLISHED_S = 30.0
# What the cluster says of itself, which comes and goes whoever asks.
_PASSING = {"componentstatuses", "events", "leases"}
# Admission that a controller would have to answer: it makes tokens, and takes finalizers of claims away.
_ADMISSION_OFF = "ServiceAccount,StorageObjectInUseProtection"


class Refused(HybridError):
    """The API server does not take what it was sent."""


class Api:
    """The API server, as its administrator."""

    def __init__(self, url: str, token: str, authority: Path, kubeconfig: Path) -> None:
        """Opens no connection yet. `kubeconfig` is where what Helm reads is."""
        context = ssl.create_default_context(cafile=authority)
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, headers=headers, verify=context, trust_env=False, timeout=30)
        self.kubeconfig = kubeconfig

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def call(self, method: str, path: str, body: Manifest | None = None) -> Any:
        """The answer, as data.

        Raises:
            Refused: with what the API server said.
        """
        answer = self._client.request(method, path, json=body)
        if answer.is_success:
            return answer.json()
        said = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
        raise Refused(str(said.get("message") or f"{method} {path}: status {answer.status_code}"))

    def namespace(self, name: str) -> None:
        """Makes a namespace whose pods must keep to "restricted"."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.call(
            "POST",
            "/api/v1/namespaces",
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        )

    def submit(self, pod: Manifest, namespace: str) -> None:
        """Has a pod judged, and not stored.

        Raises:
            Refused: it is not admitted.
        """
        # Which classes there are is the cluster's, not the chart's.
        spec = {key: pod["spec"][key] for key in pod["spec"].keys() - {"priorityClassName", "runtimeClassName"}}
        metadata = {**pod["metadata"], "namespace": namespace}
        body = {**pod, "spec": spec, "metadata": metadata}
        self.call("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict", body)

    def define(self, definition: Manifest) -> None:
        """Declares a custom kind; returns when it can be used."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        self.call("POST", path, definition)
        until = time.monotonic() + _ESTABLISHED_S
        while time.monotonic() < until:
            status = self.call("GET", f"{path}/{definition['metadata']['name']}").get("status") or {}
            conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
            if conditions.get("Established") == "True":
                return
            time.sleep(0.05)
        raise StackError(f"{definition['metadata']['name']} was not established within {_ESTABLISHED_S:g} s")

    def objects(self, namespace: str) -> dict[str, Manifest]:
        """Everything in the namespace and outside of all, by kind and name."""
        found = {}
        for base, resource in self._resources():
            inside = f"namespaces/{namespace}/" if resource["namespaced"] else ""
            for each in self.call("GET", f"{base}/{inside}{resource['name']}")["items"]:
                found[f"{resource['kind']}/{each['metadata']['name']}"] = each
        return found

    def _resources(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        groups = self.call("GET", "/apis")["groups"]
        for base in ["/api/v1", *(f"/apis/{each['preferredVersion']['groupVersion']}" for each in groups)]:
            for resource in self.call("GET", base)["resources"]:
                if "list" in resource["verbs"] and resource["name"] not in _PASSING:
                    yield base, resource


@contextlib.contextmanager
def api_server(cache: Path, folder: Path) -> Iterator[Api]:
    """A new API server over a new etcd, both on free ports of 127.0.0.1, for the length of a `with` block.

    Args:
        cache: where `helm.tools.install` put the programs.
        folder: an empty one for their data, keys and logs.

    Raises:
        StackError: one is not installed, or does not start.
    """
    client, peer, port = free_ports(3)
    with (
        running(_etcd(cache, folder, client, peer), folder),
        running(_kube_apiserver(cache, folder, client, port), folder),
    ):
        url = f"https://127.0.0.1:{port}"
        token = (folder / "tokens.csv").read_text().partition(",")[0]
        kubeconfig = folder / "kubeconfig"
        _write_kubeconfig(kubeconfig, url, token, folder / "server.crt")
        api = Api(url, token, folder / "server.crt", kubeconfig)
        try:
            yield api
        finally:
            api.close()


def _etcd(cache: Path, folder: Path, client: int, peer: int) -> Service:
    clients, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    return Service(
        name="etcd",
        command=[
            str(install.ETCD.program(cache)),
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",  # nothing of it is needed after a crash
            "--log-level=warn",
        ],
        ready=http_ok(f"{clients}/health"),
        ports={"etcd": client, "etcd-peer": peer},
    )


def _kube_apiserver(cache: Path, folder: Path, etcd: int, port: int) -> Service:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    from serving.testing import Certificate

    server = Certificate.write(folder, "server")
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    signing = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(*form)
    _write_secret(folder / "accounts.key", signing.decode())
    _write_secret(folder / "tokens.csv", f'{secrets.token_urlsafe(32)},admin,1,"system:masters"\n')
    return Service(
        name="kube-apiserver",
        command=[
            str(install.API_SERVER.program(cache)),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={folder}",
            f"--tls-cert-file={server.chain}",
            f"--tls-private-key-file={server.key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder / 'accounts.key'}",
            f"--service-account-signing-key-file={folder / 'accounts.key'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/16",
            f"--disable-admission-plugins={_ADMISSION_OFF}",
            "--watch-cache=false",  # a list shows what was just removed as removed
        ],
        ready=http_ok(f"https://127.0.0.1:{port}/readyz", server.chain),
        ports={"kube-apiserver": port},
        stop_timeout_s=5,  # it would wait a minute for others to notice
    )


def _write_kubeconfig(file: Path, url: str, token: str, authority: Path) -> None:
    certificate = base64.b64encode(authority.read_bytes()).decode()
    cluster = {"server": url, "certificate-authority-data": certificate}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "it", "user": {"token": token}}],
    }
    _write_secret(file, json.dumps(config))


def _write_secret(file: Path, text: str) -> None:
    """For its owner only."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)


@dataclass(frozen=True)
class Life:
    """What a release goes through in one namespace.

    Attributes:
        name: of the file of values.
        first: chart and values that are installed.
        then: chart and files of values that it is upgraded to.
    """

    name: str
    first: tuple[Path, tuple[Path, ...]]
    then: tuple[Path, tuple[Path, ...]]


class Cluster:
    """Helm, against one API server."""

    def __init__(self, api: Api, chart: Chart, folder: Path) -> None:
        """`folder` is an empty one for what Helm remembers."""
        self._api, self._chart, self._folder = api, chart, folder

    def live(self, life: Life, namespace: str) -> list[Finding]:
        """Installs, upgrades, rolls back and removes a release.

        Returns:
            What was refused, what of it remained, and what a rollback did not bring back.
        """
        self._api.namespace(namespace)
        before = self._api.objects(namespace)
        found = []
        try:
            self._helm(namespace, "install", *life.first[1], chart=life.first[0])
            installed = self._manifest(namespace)
            found += self._judge(life.name, namespace)
            self._helm(namespace, "upgrade", *life.then[1], chart=life.then[0])
            upgraded = self._manifest(namespace)
            found += self._judge(life.name, namespace)
            if upgraded == installed:
                found.append(Finding(life.name, "the upgrade changed nothing", "change a value in upgrade.yaml"))
            self._helm(namespace, "rollback", "1")
            if self._manifest(namespace) != installed:
                found.append(Finding(life.name, "after the rollback the release is not what was installed"))
            self._helm(namespace, "uninstall")
        except Refused as error:
            return [*found, Finding(life.name, str(error))]
        return [*found, *self._remains(life.name, namespace, before)]

    def is_refused(self, life: Life, namespace: str, kinds: Sequence[str]) -> list[Finding]:
        """Installs what needs custom kinds that are not there: it must be refused by their name, and leave nothing."""
        self._api.namespace(namespace)
        before = self._api.objects(namespace)
        try:
            self._helm(namespace, "install", *life.first[1], chart=life.first[0])
        except Refused as error:
            if not any(kind in str(error) for kind in kinds):
                return [Finding(life.name, f"refused, but without naming any of {', '.join(kinds)}: {error}")]
        else:
            return [Finding(life.name, f"installed without {', '.join(kinds)}")]
        return self._remains(life.name, namespace, before)

    def needs(self, life: Life) -> list[str]:
        """The custom kinds that a release asks for where the cluster has none."""
        folder, values = life.first
        options = [f"--values={each}" for each in values]
        version = f"--kube-version={install.API_SERVER.version}"
        done = self._chart.run(install.HELM, "template", RELEASE, str(folder), version, *options)
        if done.returncode:
            raise Refused(done.stderr.strip())
        custom = {(each.api_version, each.kind) for each in self._chart.custom}
        rendered = manifests.read(done.stdout)
        return sorted({each["kind"] for each in rendered if (each["apiVersion"], each["kind"]) in custom})

    def _judge(self, name: str, namespace: str) -> list[Finding]:
        """Submits each pod that the release asks for, its hooks' among them."""
        found = []
        hooks = self._run(namespace, "get", "hooks", RELEASE)
        for each in manifests.read(f"{self._manifest(namespace)}\n---\n{hooks}"):
            for pod in manifests.pods(each):
                try:
                    self._api.submit(pod, namespace)
                except Refused as error:
                    found.append(Finding(f"{name} {manifests.name_of(each)}", str(error)))
        return found

    def _remains(self, name: str, namespace: str, before: Mapping[str, Manifest]) -> list[Finding]:
        after = self._api.objects(namespace)
        left = [key for key in after.keys() - before.keys() if not manifests.is_kept(after[key])]
        fix = "remove it, or annotate it helm.sh/resource-policy: keep"
        found = [Finding(f"{name} {key}", "is still there after the release was removed", fix) for key in sorted(left)]
        return found + [
            Finding(f"{name} {key}", "was there before, and is gone") for key in before.keys() - after.keys()
        ]

    def _manifest(self, namespace: str) -> str:
        return self._run(namespace, "get", "manifest", RELEASE)

    def _helm(self, namespace: str, command: str, *arguments: Path | str, chart: Path | None = None) -> None:
        given = (
            [str(chart), *(f"--values={each}" for each in arguments)] if chart else [str(each) for each in arguments]
        )
        self._run(namespace, command, RELEASE, *given, f"--timeout={_HELM_S:g}s")

    def _run(self, namespace: str, *arguments: str) -> str:
        names = ("CACHE", "CONFIG", "DATA")
        environment = {
            **os.environ,
            **{f"HELM_{name}_HOME": str(self._folder / name.lower()) for name in names},
            "KUBECONFIG": str(self._api.kubeconfig),
            "KUBECACHEDIR": str(self._folder / "kube"),
            "NO_PROXY": "127.0.0.1",
        }
        command = [str(install.HELM.program(self._chart.cache)), *arguments, f"--namespace={namespace}"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=2 * _HELM_S
        )
        if done.returncode:
            raise Refused(f"helm {' '.join(arguments[:2])}: {done.stderr.strip()}")
        return done.stdout


def lives(chart: Chart, work: Path) -> list[Life]:
    """One for each file of values; with a previous version, one more for each that it had, from it to the chart.

    Args:
        chart: with `upgrade.yaml` beside it: the values that an upgrade of the chart to itself changes.
        work: an empty folder for the previous version.

    Raises:
        ConfigError: there is no `upgrade.yaml`.
    """
    changed = chart.beside / "upgrade.yaml"
    if not changed.is_file():
        raise ConfigError(
            f"{changed} must hold the values that an upgrade changes, such as an image's tag; there is none"
        )
    own = [
        Life(f"ci/{each.name}", (chart.folder, (each,)), (chart.folder, (each, changed))) for each in chart.values_files
    ]
    package = previous_chart(chart)
    if package is None:
        return own
    with tarfile.open(package) as archive:
        archive.extractall(work, filter="data")
    old = next(work.iterdir())
    pairs = [(each, chart.folder / "ci" / each.name) for each in sorted((old / "ci").glob("*.yaml"))]
    return own + [
        Life(f"{package.stem} ci/{before.name}", (old, (before,)), (chart.folder, (after,)))
        for before, after in pairs
        if after.is_file()
    ]


def run(chart: Chart) -> Iterator[Result]:
    """Every life, without the custom kinds and with them; no process is left."""
    with tempfile.TemporaryDirectory(prefix="chart-cluster-") as work:
        folders = {name: Path(work) / name for name in ("server", "without", "with", "previous")}
        for folder in folders.values():
            folder.mkdir()
        began = time.monotonic()
        with api_server(chart.cache, folders["server"]) as api:
            yield Result("start", f"Kubernetes {install.API_SERVER.version}", [], round(time.monotonic() - began, 2))
            planned, number = lives(chart, folders["previous"]), 0
            for kinds in ("without", "with"):
                if kinds == "with":
                    yield _define(api, chart)
                cluster = Cluster(api, chart, folders[kinds])  # Helm remembers which kinds there are
                for life in planned:
                    number += 1
                    yield _timed(cluster, life, f"test-{number}", custom=kinds == "with")


def _define(api: Api, chart: Chart) -> Result:
    began, count = time.monotonic(), 0
    for file in sorted((chart.beside / "crds-for-tests").glob("*.yaml")):
        for definition in manifests.read(file.read_text()):
            api.define(definition)
            count += 1
    return Result("kinds", f"{count} custom kinds", [], round(time.monotonic() - began, 2))


def _timed(cluster: Cluster, life: Life, namespace: str, *, custom: bool) -> Result:
    began = time.monotonic()
    try:
        needed = [] if custom else cluster.needs(life)
        findings = cluster.is_refused(life, namespace, needed) if needed else cluster.live(life, namespace)
    except Refused as error:
        needed, findings = [], [Finding(life.name, str(error))]
    note = f"{life.name}, refused without {', '.join(needed)}" if needed else life.name
    return Result("with" if custom else "without", note, findings, round(time.monotonic() - began, 2))


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helm.tools.cluster", description=__doc__)
    parser.add_argument("--chart", type=Path, default=Path("helm/hybrid"), help="its folder (default: helm/hybrid)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    given = parser.parse_args(arguments)
    results = []
    try:
        for result in run(Chart(given.chart, default_cache())):
            show(result)
            results.append(result)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    failed = [each for each in results if each.findings]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
