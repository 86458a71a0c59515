from helm.tools.schema import disagreements, unset

OBJECT = {"type": "object", "additionalProperties": False}


def test_a_schema_that_knows_each_value_and_no_other_agrees():
    """References, alternatives and parts of a schema are looked into; an empty value may lack every property."""
    schema = {
        **OBJECT,
        "properties": {
            "image": {"$ref": "#/$defs/image"},
            "probe": {**OBJECT, "properties": {"periodSeconds": {"type": "integer"}}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "scale": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"hpa": {"type": "boolean"}, "keda": {}},
                "allOf": [{"properties": {"keda": {"type": "boolean"}}}],
            },
        },
        "$defs": {"image": {**OBJECT, "properties": {"tag": {"type": ["string", "null"]}}}},
    }
    values = {"image": {"tag": None}, "probe": {}, "labels": {"a": "b"}, "scale": {"hpa": False, "keda": False}}
    assert disagreements(values, schema) == []


def test_a_value_without_a_schema_is_named_and_the_other_way_round():
    """The path is that of the value."""
    schema = {**OBJECT, "properties": {"image": {**OBJECT, "properties": {"tag": {}, "digest": {}}}}}
    assert sorted(disagreements({"image": {"tag": "1", "tga": "2"}}, schema)) == [
        "image.digest: the schema has it, values.yaml does not: give it its default and a comment",
        "image.tga: values.yaml has it, the schema does not",
        "image: the default is refused: Additional properties are not allowed ('tga' was unexpected)",
    ]


def test_an_option_that_is_shared_through_a_definition_may_be_absent():
    """Every pod may have labels of its own; values.yaml need not say so for each."""
    schema = {
        **OBJECT,
        "properties": {
            "worker": {**OBJECT, "properties": {"labels": {"$ref": "#/$defs/pod/properties/labels"}, "replicas": {}}},
            "resources": {"$ref": "#/$defs/resources"},
        },
        "$defs": {
            "pod": {**OBJECT, "properties": {"labels": {}}},
            "resources": {**OBJECT, "properties": {"requests": {}, "claims": {}}},
        },
    }
    assert disagreements({"worker": {"replicas": 1}, "resources": {"requests": {}}}, schema) == []


def test_an_object_that_takes_any_key_is_named():
    """Below `if` and `then` it may, since they look at some keys and leave the rest to others."""
    whole = {"type": "object", "properties": {"image": {"type": "object", "properties": {"tag": {}}}}}
    schema = {**OBJECT, **whole, "if": {"properties": {"image": {"properties": {"tag": {}}}}}, "then": True}
    assert disagreements({"image": {"tag": "1"}}, schema) == [
        "#/properties/image: an object must say additionalProperties: false, or true where anything is passed on"
    ]


def test_a_renamed_value_is_in_the_schema_and_not_in_the_values():
    """Either way of saying so: deprecated, or refusing every value."""
    schema = {**OBJECT, "properties": {"new": {}, "old": {"not": {}}, "older": {"deprecated": True}}}
    assert disagreements({"new": 1}, schema) == []
    assert disagreements({"new": 1, "older": 2}, schema) == [
        "older: it was renamed, so values.yaml must not have it",
    ]


def test_a_default_that_the_schema_refuses_is_named():
    """With its path and what was wrong."""
    schema = {**OBJECT, "properties": {"worker": {**OBJECT, "properties": {"replicas": {"minimum": 1}}}}}
    assert disagreements({"worker": {"replicas": 0}}, schema) == [
        "worker.replicas: the default is refused: 0 is less than the minimum of 1"
    ]


def test_values_that_no_file_sets_are_named():
    """A map that is empty by default is one value; the others are asked key by key, of each file."""
    values = {"a": 1, "b": {"c": 2, "d": {}, "g": 4}, "e": {"f": 3}}
    assert unset(values, [{"a": 0, "b": {"d": {"x": 1}}}, {"b": {"g": 0}}]) == ["b.c", "e"]
