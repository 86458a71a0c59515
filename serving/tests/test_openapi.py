import json
import re

import jsonschema_rs
import pytest

from hybrid.spec import Serving
from serving import oip, openapi
from serving.deployments import Deployments
from serving.gateway import Gateway
from serving.testing import deployment

SHOP = deployment()


def resolved(schema):
    """With what it refers to beside it, for a validator."""
    return schema | {"components": {"schemas": openapi.SCHEMAS}}


def test_every_path_of_the_gateway_is_described_and_no_other(tmp_path):
    """The routes with the served model and version filled in, and their methods."""
    SHOP.write(tmp_path)
    routes = Gateway(Deployments(tmp_path), None, lambda: True).routes()
    filled = {
        route.path.format(model="shop", version=1, ticket="{ticket}"): {m.lower() for m in route.methods - {"HEAD"}}
        for route in routes
    }
    described = {
        path: set(item) - {"parameters"} for path, item in openapi.document([SHOP], guarded=False)["paths"].items()
    }
    assert described == filled


def test_a_credential_is_described_where_one_is_asked_for():
    """Everywhere but on the probes."""
    guarded = openapi.document([SHOP], guarded=True)
    assert guarded["security"] == [{"bearer": []}]
    opened = [path for path, item in guarded["paths"].items() if item.get("get", {}).get("security") == []]
    assert opened == ["/v2/health/live", "/v2/health/ready"]
    assert "security" not in openapi.document([SHOP], guarded=False)


@pytest.mark.parametrize("join_key_type", ["text", "integer"])
def test_the_example_is_valid_and_is_read(join_key_type):
    """By its own schema, and by the gateway."""
    served = deployment(join_key_type=join_key_type)
    example = openapi.example(served)
    jsonschema_rs.validate(openapi.request_schema(served), example)
    assert len(oip.decode(json.dumps(example).encode(), None, served).rows) == 1


def test_a_request_that_is_not_of_the_schema_is_no_request():
    """Another input, a text for a number, an embedding of another width: refused by both."""
    wrong = [openapi.example(SHOP) for _ in range(3)]
    wrong[0]["inputs"][1]["name"] = "mood"
    wrong[1]["inputs"][2]["data"] = ["x"]
    wrong[2]["inputs"][3]["shape"] = [1, 3]
    for request in wrong:
        assert not jsonschema_rs.is_valid(openapi.request_schema(SHOP), request)
        with pytest.raises(oip.BadRequest):
            oip.decode(json.dumps(request).encode(), None, SHOP)


def test_the_metadata_and_the_references_hold():
    """The model's metadata is of its schema, and each $ref is there."""
    jsonschema_rs.validate(resolved(openapi.SCHEMAS["Model"]), oip.model_metadata(SHOP, [1]))
    text = json.dumps(openapi.document([SHOP], guarded=True))
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(openapi.SCHEMAS)


def test_a_model_that_merges_on_the_device_is_described_as_it_is():
    """Its example holds nothing of the device and is read; a request with an embedding is refused by both."""
    served = SHOP.model_copy(update={"merge": "device"})
    example, schema = openapi.example(served), openapi.request_schema(served)
    jsonschema_rs.validate(schema, example)
    assert [tensor["name"] for tensor in example["inputs"]] == ["entity", "hour", "budget"]
    assert len(oip.decode(json.dumps(example).encode(), None, served).rows) == 1
    with_embedding = openapi.example(SHOP)
    assert not jsonschema_rs.is_valid(schema, with_embedding)
    with pytest.raises(oip.BadRequest):
        oip.decode(json.dumps(with_embedding).encode(), None, served)
    cases = ((["server_embedding", "expires_ms"], True), (["prediction"], False), (["server_slots"], False))
    for outputs, valid in cases:
        named = example | {"outputs": [{"name": name} for name in outputs]}
        assert jsonschema_rs.is_valid(schema, named) == valid
    giving = served.model_copy(update={"serving": Serving(contribution=True), "contributes": "slots"})
    named = example | {"outputs": [{"name": "server_slots"}]}
    assert jsonschema_rs.is_valid(openapi.request_schema(giving), named)
    assert oip.decode(json.dumps(named).encode(), None, giving).rows.slots == 3
