"""Manifests as data: read from rendered YAML, named, held against schemas, and the pods that they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

from hybrid.errors import ConfigError

Manifest = dict[str, Any]

_CORE = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_TEMPLATES = {  # kind -> where its pod template lies
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the one in C where there is one
    """Reads what Kubernetes reads: no dates, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1} - {"<<"}
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: the key {sorted(map(str, twice))[0]!r} is there twice")
        return dict(super().construct_mapping(node, deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(text: str) -> list[Manifest]:
    """The documents of a YAML file, without empty ones.

    Raises:
        ConfigError: it is not YAML, a mapping has a key twice, or a document is no object with kind and name.
    """
    try:
        documents = [each for each in yaml.load_all(text, Loader=_Loader) if each is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}") from None
    for each in documents:
        if not isinstance(each, dict) or not each.get("kind") or not (each.get("metadata") or {}).get("name"):
            raise ConfigError(f"every document must have apiVersion, kind and metadata.name, got {str(each)[:200]}")
    return documents


def values_of(file: Path) -> dict[str, Any]:
    """A file of values.

    Raises:
        ConfigError: it is not a YAML mapping, or has a key twice.
    """
    try:
        values = yaml.load(file.read_text(), Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{file} must be a mapping of values, got {type(values).__name__}")
    return values or {}


def name_of(manifest: Mapping[str, Any]) -> str:
    """Such as `Deployment/hybrid-gateway`, with its namespace where it names one."""
    metadata = manifest.get("metadata") or {}
    namespace = f"{metadata['namespace']}/" if metadata.get("namespace") else ""
    return f"{manifest.get('kind')}/{namespace}{metadata.get('name')}"


def is_kept(manifest: Mapping[str, Any]) -> bool:
    """Whether Helm leaves the object where it is when the release goes."""
    return bool((manifest["metadata"].get("annotations") or {}).get("helm.sh/resource-policy") == "keep")


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """The pods that an object asks for, as Pod objects: none, or one.

    A StatefulSet's claims are volumes of its pods, as its controller makes them.
    """
    if manifest["kind"] == "Pod":
        yield {**manifest, "metadata": {**manifest["metadata"]}}
        return
    if manifest["kind"] not in _TEMPLATES:
        return
    template: Any = manifest
    for key in _TEMPLATES[manifest["kind"]]:
        template = template[key]
    spec = dict(template["spec"])
    claims = [each["metadata"]["name"] for each in manifest["spec"].get("volumeClaimTemplates") or []]
    if claims:
        made = [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-0"}} for name in claims]
        spec["volumes"] = [*(spec.get("volumes") or []), *made]
    metadata = {**(template.get("metadata") or {}), "name": manifest["metadata"]["name"]}
    yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@dataclass(frozen=True)
class CustomKind:
    """One version of a kind that Kubernetes does not have by itself."""

    group: str
    version: str
    kind: str
    schema: Mapping[str, Any]

    @property
    def api_version(self) -> str:
        """As manifests name it."""
        return f"{self.group}/{self.version}"


def custom_kinds(files: Iterable[Path]) -> list[CustomKind]:
    """The kinds that CustomResourceDefinitions declare, each with its schema made strict."""
    definitions = [each for file in files for each in read(file.read_text())]
    return [
        CustomKind(
            each["spec"]["group"],
            version["name"],
            each["spec"]["names"]["kind"],
            _strict(version["schema"]["openAPIV3Schema"], root=True),
        )
        for each in definitions
        for version in each["spec"]["versions"]
        if version["served"]
    ]


class Schemas:
    """What one Kubernetes version takes, with the custom kinds given."""

    def __init__(self, folder: Path, custom: Sequence[CustomKind]) -> None:
        """Reads `<folder>/_definitions.json`, as `helm.tools.install` puts it there."""
        self._definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
        self._names = {
            (each["group"], each["version"], each["kind"]): name
            for name, definition in self._definitions.items()
            for each in definition.get("x-kubernetes-group-version-kind", [])
        }
        self._custom = {(each.group, each.version, each.kind): each.schema for each in custom}
        self._validators: dict[tuple[str, str, str], Any] = {}

    def errors(self, manifest: Manifest) -> list[str]:
        """What is wrong with a manifest; an unknown kind, field or API version is."""
        api_version = str(manifest.get("apiVersion"))
        group, _, version = api_version.rpartition("/")
        key = (group, version, manifest["kind"])
        if key not in self._validators:
            schema = self._schema(key)
            if schema is None:
                return [f"there is no kind {manifest['kind']!r} in {api_version!r}"]
            self._validators[key] = jsonschema_rs.Draft202012Validator(schema)
        return [_sentence(error) for error in self._validators[key].iter_errors(manifest)]

    def _schema(self, key: tuple[str, str, str]) -> dict[str, Any] | None:
        if key in self._custom:
            metadata = {"metadata": {"$ref": f"#/$defs/{_CORE}"}}
            custom = self._custom[key]
            properties = {**custom.get("properties", {}), **metadata}
            return {**custom, "properties": properties, "$defs": self._definitions}
        if key in self._names:
            return {"$ref": f"#/$defs/{self._names[key]}", "$defs": self._definitions}
        return None


def _sentence(error: Any) -> str:
    where = ".".join(map(str, error.instance_path)) or "the object"
    return f"{where}: {str(error.message)[:300]}"


def _strict(schema: Any, *, root: bool = False) -> Any:
    """The schema of a CustomResourceDefinition as JSON Schema that refuses fields it does not know."""
    if not isinstance(schema, dict):
        return schema
    strict = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties"):
        if key in strict:
            strict[key] = _strict(strict[key])
    if "properties" in strict:
        strict["properties"] = {name: _strict(each) for name, each in strict["properties"].items()}
        if root:
            strict["properties"] = {**dict.fromkeys(("apiVersion", "kind", "metadata"), True), **strict["properties"]}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    return strict
