"""`python -m helm.tools.check` holds the chart to what it promises, without a cluster.

Each step is a function from the chart to what is wrong with it. All steps run,
whatever an earlier one found; the exit status is 1 where one found something.
`--write` brings the README and the snapshots up to date in place of complaining.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from helm.tools import install, manifests, restricted, schema
from helm.tools.manifests import Manifest
from hybrid.errors import ConfigError, HybridError
from hybrid.local.process import default_cache

RELEASE, NAMESPACE = "hybrid", "hybrid"

# What gives another answer each time, or another one without a cluster: Argo CD and Flux render without.
_UNREPEATABLE = re.compile(
    r"\b(lookup|now|ago|randAlphaNum|randAlpha|randNumeric|randAscii|randInt|randBytes|shuffle|uuidv4|genPrivateKey|"
    r"genCA|genCAWithKey|genSelfSignedCert|genSelfSignedCertWithKey|genSignedCert|genSignedCertWithKey|htpasswd|bcrypt|"
    r"encryptAES|getHostByName)\b"
)
_ACTION = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_QUOTED_OR_COMMENT = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"|`[^`]*`|\.\w+|\$\w+', re.DOTALL)
_BARE_ROW = re.compile(r"^\| ([\w.\[\]-]+) \| .* \|\s*\|$", re.MULTILINE)  # of helm-docs' table of values
_WARNING = 5  # as kube-score grades: 10 is right, 7 almost, 5 a warning, 1 critical
_IMMUTABLE = {  # kind -> paths that an upgrade may not change
    "Deployment": ("spec.selector",),
    "StatefulSet": (
        "spec.selector",
        "spec.serviceName",
        "spec.podManagementPolicy",
        "spec.volumeClaimTemplates",
    ),
    "Job": ("spec.template", "spec.selector", "spec.completions"),
    "PersistentVolumeClaim": ("spec.accessModes", "spec.storageClassName"),
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        where: file, values file or object.
        what: must be said in one sentence.
        fix: what to do.
    """

    where: str
    what: str
    fix: str = ""


class Chart:
    """A chart, what stands beside it, and the programs that look at it."""

    def __init__(self, folder: Path, cache: Path, *, write: bool = False) -> None:
        """Reads nothing yet.

        Args:
            folder: of the chart; `crds-for-tests`, `lint.toml` and `previous` lie beside it.
            cache: where `helm.tools.install` put the programs.
            write: whether README and snapshots are brought up to date.
        """
        self.folder, self.cache, self.write = folder.resolve(), cache, write
        self.beside = self.folder.parent
        self._renders: dict[tuple[Path, Path, str], str] = {}
        self._objects: dict[str, list[Manifest]] = {}

    @cached_property
    def values_files(self) -> list[Path]:
        """`ci/*.yaml`: what people install.

        Raises:
            ConfigError: there is none.
        """
        files = sorted((self.folder / "ci").glob("*.yaml"))
        if not files:
            raise ConfigError(f"{self.folder / 'ci'} must hold at least one file of values, such as default.yaml")
        return files

    @cached_property
    def custom(self) -> list[manifests.CustomKind]:
        """The kinds of `crds-for-tests`."""
        return manifests.custom_kinds(sorted((self.beside / "crds-for-tests").glob("*.yaml")))

    def run(self, tool: install.Tool, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs one of the programs away from what the user has set up for Helm."""
        with tempfile.TemporaryDirectory() as home:
            homes = {f"HELM_{name}_HOME": f"{home}/{name.lower()}" for name in ("CACHE", "CONFIG", "DATA")}
            return subprocess.run(
                [str(tool.program(self.cache)), *arguments],
                env={**os.environ, **homes, "NO_COLOR": "1"},
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
            )

    def render(self, values: Path, version: str, *, chart: Path | None = None, again: bool = False) -> str:
        """`helm template` of a file of values for a Kubernetes version that has the custom kinds.

        Raises:
            ConfigError: Helm refuses; says why.
        """
        folder = chart or self.folder
        key = (folder, values, version)
        if again or key not in self._renders:
            known = sorted({each.api_version for each in self.custom})
            kinds = [f"--api-versions={each.api_version}/{each.kind}" for each in self.custom]
            for_version = [f"--kube-version={version}.0", *(f"--api-versions={each}" for each in known), *kinds]
            named = [RELEASE, str(folder), f"--namespace={NAMESPACE}", f"--values={values}"]
            done = self.run(install.HELM, "template", *named, *for_version)
            if done.returncode:
                raise ConfigError(done.stderr.strip())
            self._renders[key] = done.stdout
        return self._renders[key]

    def objects(self, values: Path, version: str = install.KUBERNETES[-1]) -> list[Manifest]:
        """The rendered objects.

        Raises:
            ConfigError: Helm refuses, or what it renders is not what Kubernetes reads.
        """
        text = self.render(values, version)
        if text not in self._objects:
            self._objects[text] = manifests.read(text)
        return self._objects[text]


Step = Callable[[Chart], tuple[str, list[Finding]]]


def check_schema(chart: Chart) -> tuple[str, list[Finding]]:
    """The schema and values.yaml know the same values, and the schema refuses others."""
    file = chart.folder / "values.schema.json"
    if not file.is_file():
        return "", [Finding("values.schema.json", "there is none", "write it: Helm checks values against it")]
    values = manifests.values_of(chart.folder / "values.yaml")
    wrong = schema.disagreements(values, json.loads(file.read_text()))
    return f"{len(_leaves(values))} values", [Finding("values.schema.json", each) for each in wrong]


def check_coverage(chart: Chart) -> tuple[str, list[Finding]]:
    """Every value is set by some file of `ci`, so that no part of a template is never rendered."""
    values = manifests.values_of(chart.folder / "values.yaml")
    missing = schema.unset(values, [manifests.values_of(each) for each in chart.values_files])
    fix = "set it in ci/everything.yaml, or in another file where the two exclude each other"
    return "", [Finding("ci", f"no file sets {each}", fix) for each in missing]


def check_lint(chart: Chart) -> tuple[str, list[Finding]]:
    """`helm lint --strict` has nothing to say."""
    found = []
    for values in chart.values_files:
        version = f"--kube-version={install.KUBERNETES[-1]}.0"
        done = chart.run(install.HELM, "lint", "--strict", "--quiet", version, f"--values={values}", str(chart.folder))
        if done.returncode:
            found.append(Finding(_name(values), f"{done.stdout}{done.stderr}".strip()))
    return _count(chart.values_files, "values file"), found


def check_readme(chart: Chart) -> tuple[str, list[Finding]]:
    """README.md is what helm-docs makes of README.md.gotmpl and values.yaml; each value or its map has a comment."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / chart.folder.name
        copy.mkdir()
        for name in ("Chart.yaml", "values.yaml", "README.md.gotmpl"):
            if (chart.folder / name).is_file():
                shutil.copy(chart.folder / name, copy)
        done = chart.run(install.DOCS, f"--chart-search-root={work}", "--sort-values-order=file")
        if done.returncode or not (copy / "README.md").is_file():
            return "", [Finding("README.md.gotmpl", _last(done.stderr), "mend it, or values.yaml")]
        made = (copy / "README.md").read_text()
    readme = chart.folder / "README.md"
    if chart.write:
        readme.write_text(made)
    bare = _BARE_ROW.findall(made)
    found = [
        Finding("values.yaml", f"{each} has no comment", "say above it, or its map: `# -- what it does`")
        for each in bare
    ]
    return "", found + _drift("README.md", readme.read_text() if readme.is_file() else "", made)


def check_unittest(chart: Chart) -> tuple[str, list[Finding]]:
    """helm-unittest's suites pass, and every snapshot is there, none too many."""
    suites = sorted(chart.folder.glob("tests/*_test.yaml"))
    if not suites:
        return "", [Finding("tests", "there is no *_test.yaml", "write one")]
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / chart.folder.name
        shutil.copytree(chart.folder, copy)  # helm-unittest writes a snapshot that is missing
        options = ["--strict", *(["--update-snapshot"] if chart.write else [])]
        done = chart.run(install.UNITTEST, *options, str(copy))
        if done.returncode:
            return "", [Finding("tests", _without_passed(done.stdout + done.stderr), "mend it, or `--write` snapshots")]
        made, kept = copy / "tests/__snapshot__", chart.folder / "tests/__snapshot__"
        if chart.write and made.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(made, kept)
        found = [
            finding
            for name in sorted(_files(made) | _files(kept))
            for finding in _drift(f"tests/__snapshot__/{name}", _text(kept / name), _text(made / name))
        ]
    return _count(suites, "suite"), found


def check_valid(chart: Chart) -> tuple[str, list[Finding]]:
    """Every object is one that each Kubernetes version takes, fields included, and is there once."""
    found, seen = [], 0
    refused: dict[Finding, list[str]] = {}
    for version in install.KUBERNETES:
        schemas = manifests.Schemas(install.schemas(chart.cache) / version, chart.custom)
        for values in chart.values_files:
            objects = chart.objects(values, version)
            seen += len(objects)
            names = [manifests.name_of(each) for each in objects]
            if version == install.KUBERNETES[0]:
                twice = sorted({each for each in names if names.count(each) > 1})
                found += [Finding(f"{_name(values)} {name}", "is rendered twice") for name in twice]
            for each, name in zip(objects, names, strict=True):
                for error in schemas.errors(each):
                    refused.setdefault(Finding(f"{_name(values)} {name}", error), []).append(version)
    found += [replace(each, what=f"Kubernetes {', '.join(by)}: {each.what}") for each, by in refused.items()]
    return f"{seen} objects for Kubernetes {', '.join(install.KUBERNETES)}", found


def check_restricted(chart: Chart) -> tuple[str, list[Finding]]:
    """Every pod keeps to Kubernetes' Pod Security Standard "restricted"."""
    found, seen = [], 0
    for values in chart.values_files:
        for each in chart.objects(values):
            for pod in manifests.pods(each):
                seen += 1
                where = f"{_name(values)} {manifests.name_of(each)}"
                found += [Finding(where, violation) for violation in restricted.violations(pod)]
    return _count(range(seen), "pod"), found


def check_score(chart: Chart) -> tuple[str, list[Finding]]:
    """kube-score has nothing to say that `lint.toml` does not exclude with a reason."""
    exclusions = _exclusions(chart.beside / "lint.toml")
    found, used = [], set()
    for values in chart.values_files:
        text = chart.render(values, install.KUBERNETES[-1])
        for name, check, comment in sorted(_scores(chart, text)):  # it has no order of its own
            excluded = [each for each in exclusions if each.covers(name, check, comment)]
            used.update(excluded)
            if not excluded:
                found.append(
                    Finding(f"{_name(values)} {name}", f"{check}: {comment}", "mend it, or say why not in lint.toml")
                )
    idle = [each for each in exclusions if each not in used]
    found += [Finding("lint.toml", f"nothing needs {each.check} of {each.object}", "remove it") for each in idle]
    return _count(exclusions, "exclusion"), found


def check_repeatable(chart: Chart) -> tuple[str, list[Finding]]:
    """The same values give the same bytes, wherever and whenever they are rendered."""
    found = []
    for file in sorted((chart.folder / "templates").rglob("*")):
        if file.is_file():
            for line, function in _unrepeatable(file.read_text()):
                where = f"{file.relative_to(chart.folder)}:{line}"
                found.append(
                    Finding(where, f"`{function}` gives another answer each time or place", "take a value instead")
                )
    for values in chart.values_files:
        first = chart.render(values, install.KUBERNETES[-1])
        if first != chart.render(values, install.KUBERNETES[-1], again=True):
            found.append(
                Finding(_name(values), "two renders differ", "find what changes; no map order, time or chance")
            )
    return _count(chart.values_files, "render") + ", each twice", found


def check_upgrade(chart: Chart) -> tuple[str, list[Finding]]:
    """From the chart's previous version nothing changes that Kubernetes does not let change."""
    previous = previous_chart(chart)
    if previous is None:
        return "no previous version in previous/: nothing to upgrade from", []
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(previous) as archive:
            archive.extractall(work, filter="data")
        old = next(Path(work).iterdir())
        found, changed = [], 0
        for before in sorted((old / "ci").glob("*.yaml")):
            after = chart.folder / "ci" / before.name
            if not after.is_file():
                found.append(Finding(_name(before), f"{previous.name} had it, the chart does not", "keep it"))
                continue
            version = install.KUBERNETES[-1]
            ours, theirs = chart.render(after, version), chart.render(before, version, chart=old)
            changed += ours != theirs
            found += [Finding(f"{_name(after)} {where}", what) for where, what in _broken(theirs, ours)]
            _write_difference(theirs, ours, before.name)
        if changed and _version(old) == _version(chart.folder):
            what = f"version {_version(old)} was released, and now renders something else"
            found.append(Finding("Chart.yaml", what, "count the version up"))
    return f"from {previous.name}: {_count(range(changed), 'render')} differ, see build/chart-upgrade", found


def previous_chart(chart: Chart) -> Path | None:
    """The package of the last released version, `previous/*.tgz`; None before the first release.

    Raises:
        ConfigError: there are several, so that nobody can tell which is meant.
    """
    found = sorted((chart.beside / "previous").glob("*.tgz"))
    if len(found) > 1:
        raise ConfigError(
            f"{chart.beside / 'previous'} must hold the package of the last released version alone, got {found}"
        )
    return found[0] if found else None


STEPS: Mapping[str, Step] = {
    "schema": check_schema,
    "coverage": check_coverage,
    "lint": check_lint,
    "readme": check_readme,
    "unittest": check_unittest,
    "valid": check_valid,
    "restricted": check_restricted,
    "score": check_score,
    "repeatable": check_repeatable,
    "upgrade": check_upgrade,
}


@dataclass(frozen=True)
class Result:
    """What one step found."""

    step: str
    note: str
    findings: Sequence[Finding]
    seconds: float


def run(chart: Chart, steps: Sequence[str] = tuple(STEPS)) -> Iterator[Result]:
    """Runs the steps one after another; what keeps a step from its work is a finding of it."""
    for step in steps:
        began = time.monotonic()
        try:
            note, findings = STEPS[step](chart)
        except ConfigError as error:
            note, findings = "", [Finding(chart.folder.name, str(error))]
        yield Result(step, note, findings, round(time.monotonic() - began, 2))


def show(result: Result) -> None:
    """Prints one step's result, for people: what is to be done stands below all that it is to be done for."""
    word = "FAIL" if result.findings else "ok"
    print(f"{word:4}  {result.step:11} {result.seconds:5.1f} s  {result.note}", flush=True)
    for fix, findings in itertools.groupby(result.findings, key=lambda each: each.fix):
        for each in findings:
            print(f"      {each.where}: " + each.what.replace("\n", "\n        "), flush=True)
        if fix:
            print(f"        -> {fix}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helm.tools.check", description=__doc__)
    parser.add_argument("--chart", type=Path, default=Path("helm/hybrid"), help="its folder (default: helm/hybrid)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    parser.add_argument("--only", action="append", choices=STEPS, help="this step, and others so named, alone")
    parser.add_argument("--write", action="store_true", help="bring README.md and snapshots up to date")
    given = parser.parse_args(arguments)
    try:
        chart, results = Chart(given.chart, default_cache(), write=given.write), []
        for result in run(chart, given.only or tuple(STEPS)):
            show(result)
            results.append(result)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    failed = [each.step for each in results if each.findings]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


@dataclass(frozen=True)
class _Exclusion:
    """What kube-score may say: of which objects, and, where it says several things of one check, which of them."""

    check: str
    reason: str
    object: str = "*"
    says: str = ""

    def covers(self, name: str, check: str, comment: str) -> bool:
        return check == self.check and fnmatch.fnmatch(name, self.object) and self.says in comment


def _exclusions(file: Path) -> list[_Exclusion]:
    """What `lint.toml` excludes.

    Raises:
        ConfigError: an exclusion has no reason, or a key that is not known.
    """
    if not file.is_file():
        return []
    entries = tomllib.loads(file.read_text()).get("exclude", [])
    for entry in entries:
        if not entry.keys() <= {"check", "object", "says", "reason"} or not {"check", "reason"} <= entry.keys():
            must = "an exclusion must have check and reason, and may have object and says"
            raise ConfigError(f"{file.name}: {must}, got {entry}")
        if len(entry["reason"]) < 20:
            raise ConfigError(f"{file.name}: the reason of {entry['check']} must say why, got {entry['reason']!r}")
    return [_Exclusion(**entry) for entry in entries]


def _scores(chart: Chart, rendered: str) -> Iterator[tuple[str, str, str]]:
    """Object, check and comment of each that did not pass."""
    options = ["--output-format=json", f"--kubernetes-version=v{install.KUBERNETES[-1]}"]
    options += ["--disable-ignore-checks-annotations", "--enable-optional-test=container-seccomp-profile"]
    done = chart.run(install.SCORE, "score", *options, "-", stdin=rendered)
    try:
        scored = json.loads(done.stdout)
    except ValueError:
        raise ConfigError(f"kube-score failed: {done.stderr.strip() or done.stdout.strip()}") from None
    for each in scored or []:
        name = f"{each['type_meta']['kind']}/{each['object_meta']['name']}"
        for check in each["checks"]:
            if not check["skipped"] and check["grade"] <= _WARNING:
                for comment in check["comments"] or [{}]:
                    said = ": ".join(filter(None, (comment.get("path"), comment.get("summary"))))
                    yield name, check["check"]["id"], said or check["check"]["comment"]


def _unrepeatable(template: str) -> Iterator[tuple[int, str]]:
    """Line and function of each use, outside of strings, comments and names."""
    for action in _ACTION.finditer(template):
        code = _QUOTED_OR_COMMENT.sub(lambda match: " " * len(match[0]), action[0])
        for use in _UNREPEATABLE.finditer(code):
            yield template.count("\n", 0, action.start() + use.start()) + 1, use[0]


def _broken(before: str, after: str) -> Iterator[tuple[str, str]]:
    old = {manifests.name_of(each): each for each in manifests.read(before)}
    for each in manifests.read(after):
        earlier = old.get(manifests.name_of(each))
        if earlier is not None:
            for path in _IMMUTABLE.get(each["kind"], ()):
                if _at(earlier, path) != _at(each, path):
                    yield manifests.name_of(each), f"{path} changes, which Kubernetes refuses in an upgrade"


def _at(manifest: Manifest, path: str) -> Any:
    value: Any = manifest
    for key in path.split("."):
        value = (value or {}).get(key)
    return value


def _version(folder: Path) -> str:
    return str(manifests.values_of(folder / "Chart.yaml")["version"])


def _write_difference(before: str, after: str, name: str) -> None:
    folder = Path("build/chart-upgrade")
    folder.mkdir(parents=True, exist_ok=True)
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "previous", "now")
    (folder / f"{name}.diff").write_text("".join(lines))


def _drift(where: str, have: str, made: str) -> list[Finding]:
    if have == made:
        return []
    lines = list(difflib.unified_diff(have.splitlines(), made.splitlines(), "committed", "generated", lineterm="", n=1))
    return [Finding(where, "is out of date:\n" + "\n".join(lines[:20]), "run `python -m helm.tools.check --write`")]


def _leaves(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}.{leaf}" if leaf else key
        for key, value in values.items()
        for leaf in (_leaves(value) if isinstance(value, dict) and value else [""])
    ]


def _files(folder: Path) -> set[str]:
    return {each.name for each in folder.glob("*")}


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _name(values: Path) -> str:
    return f"ci/{values.name}"


def _count(items: Sequence[Any] | range, noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def _last(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-5:]) or "it said nothing"


def _without_passed(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith(" PASS"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
