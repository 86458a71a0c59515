"""What the gateway's HTTP side takes and answers now, as OpenAPI 3.1.

The paths are those of the models that are served. A schema cannot say that a
tensor has as many values as its shape says: those requests are refused with 400.

Source: https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed
from typing import Any

from hybrid.deployment import Deployment
from hybrid.protocol import DEVICE_EMBEDDING, ENTITY, HEADER_LENGTH
from hybrid.rollout import ROLLOUT
from serving import oip
from serving.results import PATH as RESULTS

SIZE = {"type": "integer", "minimum": 0, "maximum": 10**11 - 1}  # bytes
INT64 = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error", "code"],
        "properties": {
            "error": {"type": "string", "description": "For people; holds none of the request's values."},
            "code": {"type": "string", "description": "The reason as one stable word."},
        },
    },
    "Live": {"type": "object", "required": ["live"], "properties": {"live": {"const": True}}},
    "Ready": {"type": "object", "required": ["ready"], "properties": {"ready": {"type": "boolean"}}},
    "Server": {
        "type": "object",
        "required": ["name", "version", "extensions"],
        "properties": {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "extensions": {"type": "array", "items": {"type": "string"}},
        },
    },
    "ModelReady": {
        "type": "object",
        "required": ["name", "ready"],
        "properties": {"name": {"type": "string"}, "ready": {"const": True}},
    },
    "Rollout": {
        "type": "object",
        "required": ["model", "default", "canary", "halted"],
        "properties": {
            "model": {"type": "string"},
            "default": {"type": "integer", "description": "The version that devices fetch."},
            "canary": {
                "type": ["object", "null"],
                "description": "What a device fetches in its place whose own number in [0, 1) is below `share`.",
                "required": ["version", "share"],
                "properties": {"version": {"type": "integer"}, "share": {"type": "number"}},
            },
            "shadow": {
                "type": "object",
                "description": "What a device fetches too whose host app lets it and whose own number in [0, 1) is "
                "below `share`: it asks about each row once more, after the default's answer.",
                "required": ["version", "share"],
                "properties": {"version": {"type": "integer"}, "share": {"type": "number"}},
            },
            "halted": {
                "type": "array",
                "description": "Versions that were taken back, each as a message that the control plane signed.",
                "items": {"type": "string", "contentEncoding": "base64"},
            },
        },
    },
    "Tensor": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string"},
            "datatype": {"enum": ["FP32", "INT64", "BYTES"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        },
    },
    "Model": {
        "type": "object",
        "required": ["name", "versions", "platform", "inputs", "outputs"],
        "properties": {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"const": "hybrid"},
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        },
    },
    "Ticket": {
        "type": "object",
        "required": ["ticket", "expires_ms"],
        "properties": {
            "ticket": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "expires_ms": {"type": "integer", "description": "Unix time; from then on there is no such result."},
        },
    },
    "Answer": {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {
                "type": "array",
                "items": {
                    "allOf": [{"$ref": "#/components/schemas/Tensor"}],
                    "properties": {"data": {"type": "array"}},
                },
            },
        },
    },
}
PREFER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "With `respond-async`, where the gateway keeps results: a ticket at once, and the answer later.",
}
TICKET = {"name": "ticket", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"}}
REFUSALS = {
    "400": "The request cannot be read, or is not as the model's metadata says.",
    "401": "No credential, or one that does not hold.",
    "403": "The credential does not allow this.",
    "404": "No such model, version, entity, bundle or result.",
    "405": "The path has no such method.",
    "410": "The version is no longer served: fetch the bundle of a newer one.",
    "412": "The bundle is another than `If-Match` names.",
    "413": "The body is too large.",
    "416": "The bundle has nothing of the range that was asked for.",
    "429": "Too much waits (`overloaded`), or the client asks too much (`rate_limited`).",
    "500": "A fault of the gateway's own (`internal`).",
    "503": "Something the answer needs did not answer in time, or does not hold now.",
}


def document(deployments: Iterable[Deployment], guarded: bool) -> dict[str, Any]:
    """The document.

    Args:
        deployments: what is served; of one model, the default first.
        guarded: whether clients must show an API key or a token.
    """
    paths: dict[str, Any] = {
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
        "/v2": {"get": _get("What this server is", _ref("Server"))},
        f"{RESULTS}/{{ticket}}": {"get": _result(), "delete": _forget(), "parameters": [TICKET]},
        "/v2/health/live": {"get": _open(_get("Whether the process lives", _ref("Live")))},
        "/v2/health/ready": {"get": _open(_get("Whether it can answer", _ref("Ready"), unavailable=_ref("Ready")))},
    }
    for deployment in deployments:
        default, version = (
            f"/v2/models/{deployment.model}",
            f"/v2/models/{deployment.model}/versions/{deployment.version}",
        )
        if default not in paths:
            paths[ROLLOUT.format(model=deployment.model)] = {"get": _get("What devices fetch", _ref("Rollout"))}
        for path in [version] if default in paths else [default, version]:
            paths[path] = {"get": _get("Names, datatypes and shapes of the tensors", _ref("Model"))}
            paths[f"{path}/ready"] = {"get": _get("Whether the model can answer", _ref("ModelReady"))}
            paths[f"{path}/bundle"] = {"get": _bundle(deployment)}
            paths[f"{path}/infer"] = {"post": _infer(deployment)}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Hybrid gateway: Open Inference Protocol v2", "version": installed("hybrid-towers")},
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }
    if guarded:
        described["components"] = {
            "schemas": SCHEMAS,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "API key or JWT"}},
        }
        described["security"] = [{"bearer": []}]
    return described


def example(deployment: Deployment) -> dict[str, Any]:
    """A request of one row that the gateway can read; whether there is such an entity, it cannot know."""
    entity = "1" if deployment.join_key_type == "integer" else "entity"
    tensors: list[dict[str, Any]] = [{"name": ENTITY, "datatype": "BYTES", "shape": [1], "data": [entity]}]
    for name, transform in deployment.request.transforms.items():
        datatype, value = ("BYTES", "text") if transform.text else ("FP32", 1.5)
        tensors.append({"name": name, "datatype": datatype, "shape": [1], "data": [value]})
    if size := deployment.sent_embedding:
        tensors.append({"name": DEVICE_EMBEDDING, "datatype": "FP32", "shape": [1, size], "data": [0.5] * size})
    return {"inputs": tensors}


def request_schema(deployment: Deployment) -> dict[str, Any]:
    """The JSON of an inference request."""
    inputs = oip.inputs_of(deployment)
    optional = deployment.serving.missing_device != "error"  # the device embedding is
    nullable = set(deployment.request.names)
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "parameters": {
                "type": "object",
                "properties": {
                    "timeout": INT64 | {"description": "Microseconds that the caller waits; 0: as long as it takes."},
                    "binary_data_output": {"type": "boolean"},
                },
            },
            "inputs": {
                "type": "array",
                "description": "Each input once, in any order.",
                "minItems": len(inputs) - optional,
                "maxItems": len(inputs),
                "items": {"oneOf": [_tensor(tensor, tensor["name"] in nullable) for tensor in inputs]},
            },
            "outputs": {
                "type": "array",
                "description": f"Those wanted, each once; where none is named {oip.outputs_of(deployment)}.",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"enum": oip.allowed_outputs(deployment)},
                        "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
                    },
                },
            },
        },
    }


def _tensor(tensor: dict[str, Any], nullable: bool) -> dict[str, Any]:
    """One input, with its values in `data` or behind the JSON."""
    values: dict[str, Any] = {
        "type": [{"BYTES": "string", "FP32": "number"}[tensor["datatype"]], *(["null"] if nullable else [])]
    }
    if tensor["datatype"] == "BYTES":
        values["maxLength"] = oip.MAX_ENTITY_BYTES if tensor["name"] == ENTITY else oip.MAX_TEXT
    rows = {"type": "integer", "minimum": 1, "maximum": oip.MAX_ROWS}
    shape = [rows, *({"const": size} for size in tensor["shape"][1:])]
    return {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"const": tensor["name"]},
            "datatype": {"const": tensor["datatype"]},
            "shape": {"type": "array", "prefixItems": shape, "minItems": len(shape), "maxItems": len(shape)},
            "data": {
                "type": "array",
                "description": "Row by row; an embedding may be nested, one list for each row.",
                "items": values if len(shape) == 1 else {"anyOf": [values, {"type": "array", "items": values}]},
            },
            "parameters": {"type": "object", "properties": {"binary_data_size": SIZE}},
        },
    }


def _infer(deployment: Deployment) -> dict[str, Any]:
    length = {"name": HEADER_LENGTH, "in": "header", "required": False, "schema": SIZE}
    length["description"] = "Bytes of the JSON, where raw tensors follow it."
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    body = {"schema": request_schema(deployment), "example": example(deployment)}
    # The gateway does not look at the media type: the header alone says what follows the JSON.
    content = {"application/json": body, "application/octet-stream": {"schema": binary}}
    answer = {"application/json": {"schema": _ref("Answer")}, "application/octet-stream": {"schema": binary}}
    refusals = _refusals("400", "401", "403", "404", "405", "410", "413", "429", "500", "503")
    what, each = f"Predictions of {deployment.model}", "A prediction for each row"
    if deployment.merge == "device":
        what, each = f"Server embeddings of {deployment.model}, for devices", "The server's embedding for each row"
    return {
        "summary": what,
        "parameters": [length, PREFER],
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": each, "content": answer},
            "202": _taken("Location", "Preference-Applied", "Retry-After"),
            **refusals,
        },
    }


def _taken(*headers: str) -> dict[str, Any]:
    return {
        "description": "It is being computed",
        "headers": {name: {"schema": {"type": "string"}} for name in headers},
        "content": {"application/json": {"schema": _ref("Ticket")}},
    }


def _result() -> dict[str, Any]:
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    answer = {"application/json": {"schema": _ref("Answer")}, "application/octet-stream": {"schema": binary}}
    found = {"description": "The predictions, as they would have come at once", "content": answer}
    refusals = _refusals("400", "401", "403", "404", "405", "429", "500", "503")
    return {
        "summary": "What became of a request; an error is answered as it would have come at once",
        "responses": {"200": found, "202": _taken("Retry-After"), **refusals},
    }


def _forget() -> dict[str, Any]:
    refusals = _refusals("401", "403", "404", "405", "429", "500", "503")
    return {
        "summary": "Forgets an answer, also one that is still to come",
        "responses": {"204": {"description": "It is gone"}, **refusals},
    }


def _bundle(deployment: Deployment) -> dict[str, Any]:
    text = {"type": "string"}
    conditions = {
        "If-None-Match": "Entity tags that the caller has; 304 where the bundle's is among them.",
        "If-Match": "Entity tags; 412 where the bundle's is not among them.",
        "Range": "One range of bytes, as `bytes=1000-`; of several, and of what is none, nothing is taken notice of.",
        "If-Range": "The entity tag of which the caller has a part; of another, all is sent.",
    }
    asked = [
        {"name": name, "in": "header", "required": False, "schema": text, "description": why}
        for name, why in conditions.items()
    ]
    content = {"application/octet-stream": {"schema": text | {"contentMediaType": "application/octet-stream"}}}
    answers: dict[str, Any] = {"200": "All of it", "206": "The range that was asked for"}
    responses = {status: {"description": what, "content": content} for status, what in answers.items()}
    tag = {"ETag": {"schema": text, "description": "Strong: the SHA-256 of all bytes."}}
    for answer in responses.values():
        answer["headers"] = tag
    return {
        "summary": f"Device bundle of {deployment.model}, signed by the control plane; HEAD has its headers alone",
        "parameters": asked,
        "responses": responses
        | {"304": {"description": "The caller has it", "headers": tag}}
        | _refusals("401", "403", "404", "405", "410", "412", "416", "429", "500", "503"),
    }


def _get(summary: str, schema: dict[str, Any], unavailable: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = {"description": summary, "content": {"application/json": {"schema": schema}}}
    responses = {"200": answer, **_refusals("401", "403", "404", "405", "410", "429", "500", "503")}
    if unavailable is not None:
        responses["503"] = {"description": "Not yet", "content": {"application/json": {"schema": unavailable}}}
    return {"summary": summary, "responses": responses}


def _open(operation: dict[str, Any]) -> dict[str, Any]:
    """An operation that nobody must show a credential for."""
    return operation | {"security": []}


def _refusals(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {status: {"description": REFUSALS[status], "content": content} for status in statuses}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
