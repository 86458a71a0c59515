"""`python -m helm.tools.install` builds the programs that check the chart, and with `cluster` an API server.

No registry of packages has them ready-made for every machine, so they are
compiled from their Go modules, once, into `.cache/helm-tools`. Each is the main
package of its own module, built with the versions and replacements that this
module's `go.mod` names: the same program that its makers release.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.errors import HybridError, StackError
from hybrid.local.process import default_cache

_GO = "/usr/local/go/bin"  # where Go's own packages put it, also where PATH does not say so
GO = "1.26"  # the oldest that these versions ask for
SCHEMAS = "1.37.0"  # of the package kubernetes-validate, which ships Kubernetes' JSON schemas
KUBERNETES = ("1.29", "1.34", "1.37")  # the oldest that the chart takes, the API server's, the newest


@dataclass(frozen=True)
class Tool:
    """One program, as data.

    Attributes:
        name: of the program.
        module: its Go module.
        version: of the module, without the `v`.
        package: its main package.
        variables: Go variable -> text that it is linked with.
        published: where the module replaces others by folders of its own: the version that those are published as.
    """

    name: str
    module: str
    version: str
    package: str
    variables: Mapping[str, str] = field(default_factory=dict)
    published: str | None = None

    def folder(self, cache: Path) -> Path:
        """Where it is, or would be, installed."""
        return cache / "helm-tools" / f"{self.name}-{self.version}"

    def program(self, cache: Path) -> Path:
        """The installed program.

        Raises:
            StackError: it is not installed there.
        """
        program = self.folder(cache) / self.name
        if not program.is_file():
            raise StackError(
                f"{self.name} {self.version} is not in {cache}: run `python -m helm.tools.install cluster`"
            )
        return program


HELM = Tool(
    "helm",
    "helm.sh/helm/v4",
    "4.3.2",
    "helm.sh/helm/v4/cmd/helm",
    {"helm.sh/helm/v4/internal/version.version": "v4.3.2"},
)
UNITTEST = Tool(
    "helm-unittest",
    "github.com/helm-unittest/helm-unittest",
    "1.1.2",
    "github.com/helm-unittest/helm-unittest/cmd/helm-unittest",
)
DOCS = Tool(
    "helm-docs",
    "github.com/norwoodj/helm-docs",
    "1.14.2",
    "github.com/norwoodj/helm-docs/cmd/helm-docs",
    {"main.version": "1.14.2"},
)
SCORE = Tool("kube-score", "github.com/zegl/kube-score", "1.20.0", "github.com/zegl/kube-score/cmd/kube-score")
ETCD = Tool("etcd", "go.etcd.io/etcd/server/v3", "3.6.16", "go.etcd.io/etcd/server/v3")
API_SERVER = Tool(
    "kube-apiserver",
    "k8s.io/kubernetes",
    "1.34.2",
    "k8s.io/kubernetes/cmd/kube-apiserver",
    {
        "k8s.io/component-base/version.gitVersion": "v1.34.2",
        "k8s.io/component-base/version.gitMajor": "1",
        "k8s.io/component-base/version.gitMinor": "34",
    },
    published="v0.34.2",
)
CHECKS, CLUSTER = (HELM, UNITTEST, DOCS, SCORE), (ETCD, API_SERVER)


def install(tools: Sequence[Tool], cache: Path, say: Callable[[str], None] = print) -> None:
    """Builds each tool that is not there yet, and fetches Kubernetes' schemas.

    Raises:
        StackError: there is no Go, or a program does not build; says what to do.
    """
    install_schemas(cache, say)
    for tool in tools:
        _build(tool, cache, say)


def install_schemas(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Fetches the strict schemas of `KUBERNETES`, unless they are there.

    Returns:
        The folder that holds one folder for each version.

    Raises:
        StackError: the package cannot be had.
    """
    folder = schemas(cache)
    if all((folder / version / "_definitions.json").is_file() for version in KUBERNETES):
        return folder
    import uv

    say(f"Installing Kubernetes' schemas into {folder} (5 MB to download, 15 MB on disk) ...")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        target = [f"--target={work}", "--no-deps", f"kubernetes-validate=={SCHEMAS}"]
        _run([uv.find_uv_bin(), "pip", "install", "--quiet", f"--python={sys.executable}", *target], Path(work), {})
        for version in KUBERNETES:
            found = Path(work) / f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
            shutil.rmtree(folder / version, ignore_errors=True)
            shutil.move(found, folder / version)
    return folder


def schemas(cache: Path) -> Path:
    """Where the schemas are, or would be, installed."""
    return cache / "helm-tools" / f"kubernetes-schemas-{SCHEMAS}"


def _build(tool: Tool, cache: Path, say: Callable[[str], None]) -> None:
    folder, began = tool.folder(cache), time.monotonic()
    if (folder / tool.name).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    go = shutil.which("go", path=f"{os.environ.get('PATH', os.defpath)}:{_GO}")
    if go is None:
        raise StackError(
            f"{tool.name} {tool.version} is built by Go {GO} or later, and there is no `go`: install it from go.dev or "
            f"your system's packages, or put the program of that version at {folder / tool.name}"
        )
    say(f"Building {tool.name} {tool.version} into {folder} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        module, done = Path(work) / "module", Path(work) / "done"
        module.mkdir()
        done.mkdir()
        _compile(tool, go, module, done / tool.name)
        done.rename(folder)  # in one step: a folder of that name is always whole
    say(f"  {time.monotonic() - began:.0f} s")


def _compile(tool: Tool, go: str, work: Path, program: Path) -> None:
    """Builds the program by a module made in `work`."""
    variables = {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod", "GOWORK": "off"}
    (work / "go.mod").write_text(f"module tool\ngo {GO}\nrequire {tool.module} v{tool.version}\n")
    downloaded = _run([go, "mod", "download", "-json", f"{tool.module}@v{tool.version}"], work, variables)
    described = json.loads(_run([go, "mod", "edit", "-json", json.loads(downloaded)["GoMod"]], work, variables))
    with (work / "go.mod").open("a") as file:
        file.writelines(f"{line}\n" for line in _replacements(described.get("Replace") or [], tool.published))
    linked = " ".join(f"-X {name}={text}" for name, text in tool.variables.items())
    build = [go, "build", "-trimpath", f"-ldflags=-s -w {linked}", "-o", str(program), tool.package]
    _run(build, work, variables)


def _replacements(replaced: Sequence[Mapping[str, Mapping[str, str]]], published: str | None) -> Iterator[str]:
    """Lines of a `go.mod`: what a module replaces holds only where it is the main one, so the wrapper says it again."""
    for each in replaced:
        old, new = each["Old"], each["New"]
        if "Version" in new:
            yield f"replace {old['Path']} {old.get('Version', '')} => {new['Path']} {new['Version']}"
        elif published is not None:
            yield f"replace {old['Path']} => {old['Path']} {published}"


def _run(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StackError(f"`{' '.join(command)}` failed with exit status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if arguments not in ([], ["cluster"]):
        print("usage: python -m helm.tools.install [cluster]", file=sys.stderr)
        return 2
    try:
        install([*CHECKS, *CLUSTER] if arguments else CHECKS, default_cache())
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
