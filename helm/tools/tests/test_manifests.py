from pathlib import Path

import pytest

from helm.tools import manifests
from helm.tools.install import KUBERNETES, schemas
from hybrid.errors import ConfigError
from hybrid.local.process import default_cache

CONTAINER = {"name": "one", "image": "one:1"}
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "one", "labels": {"a": "b"}},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [CONTAINER]}},
    },
}


@pytest.fixture(scope="module", params=KUBERNETES)
def taken(request) -> manifests.Schemas:
    custom = manifests.custom_kinds(sorted((Path(__file__).parents[2] / "crds-for-tests").glob("*.yaml")))
    return manifests.Schemas(schemas(default_cache()) / request.param, custom)


def test_a_key_that_is_there_twice_is_refused():
    """YAML readers differ in which of the two they take."""
    with pytest.raises(ConfigError, match="line 3: the key 'name' is there twice"):
        manifests.read("kind: Pod\nmetadata:\n  name: a\n  name: b\n")


def test_a_document_without_a_name_is_refused_and_an_empty_one_is_none():
    """Every object of a chart is named by it."""
    assert manifests.read("---\n# nothing\n---\n") == []
    with pytest.raises(ConfigError, match=r"apiVersion, kind and metadata\.name"):
        manifests.read("kind: Pod\nmetadata: {}\n")


def test_the_pods_of_a_statefulset_have_its_claims_as_volumes():
    """A mount of a claim is else one of a volume that is not there."""
    claims = [{"metadata": {"name": "data"}, "spec": {}}]
    spec = {**DEPLOYMENT["spec"], "volumeClaimTemplates": claims}
    (pod,) = manifests.pods({**DEPLOYMENT, "kind": "StatefulSet", "spec": spec})
    assert pod["spec"]["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "data-0"}}]
    assert (pod["kind"], pod["metadata"]) == ("Pod", {"labels": {"a": "b"}, "name": "one"})


def test_the_pod_of_a_cronjob_is_two_templates_down():
    """And what asks for no pod has none."""
    job = {"spec": {"template": {"spec": {"containers": [CONTAINER]}}}}
    (pod,) = manifests.pods({"kind": "CronJob", "metadata": {"name": "c"}, "spec": {"jobTemplate": job}})
    assert pod["spec"]["containers"] == [CONTAINER]
    assert list(manifests.pods({"kind": "Service", "metadata": {"name": "s"}})) == []


def test_what_kubernetes_takes_is_taken(taken: manifests.Schemas):
    """In each version."""
    assert taken.errors(DEPLOYMENT) == []


def test_a_field_that_kubernetes_does_not_know_is_refused(taken: manifests.Schemas):
    """However deep it is, with its path."""
    spec = {**DEPLOYMENT["spec"]["template"]["spec"], "containers": [{**CONTAINER, "imagePolicy": "Always"}]}
    template = {**DEPLOYMENT["spec"]["template"], "spec": spec}
    (error,) = taken.errors({**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], "template": template}})
    assert error.startswith("spec.template.spec.containers.0: ")
    assert "imagePolicy" in error


def test_a_value_of_another_type_is_refused(taken: manifests.Schemas):
    """A number of replicas is no text."""
    (error,) = taken.errors({**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], "replicas": "2"}})
    assert error.startswith("spec.replicas: ")


def test_a_kind_that_nobody_declares_is_refused(taken: manifests.Schemas):
    """Nothing is passed over in silence."""
    assert taken.errors({**DEPLOYMENT, "apiVersion": "apps/v1beta1"}) == [
        "there is no kind 'Deployment' in 'apps/v1beta1'"
    ]
    certificate = {"apiVersion": "cert-manager.io/v1", "kind": "Certificate", "metadata": {"name": "c"}}
    assert taken.errors(certificate) == ["there is no kind 'Certificate' in 'cert-manager.io/v1'"]


def test_a_custom_kind_is_held_to_its_definition(taken: manifests.Schemas):
    """Fields that it lacks are refused, and so is metadata that Kubernetes would refuse."""
    trigger = {"type": "kafka", "metadata": {"lagThreshold": "50"}}
    spec = {"scaleTargetRef": {"name": "one"}, "triggers": [trigger]}
    scaled = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "one"}, "spec": spec}
    assert taken.errors(scaled) == []
    numbers = {**spec, "triggers": [{"type": "kafka", "metadata": {"lagThreshold": 50}}]}
    assert len(taken.errors({**scaled, "spec": numbers})) == 1
    assert len(taken.errors({**scaled, "spec": {**spec, "maxReplicas": 3}})) == 1
    assert len(taken.errors({**scaled, "metadata": {"name": "one", "label": {}}})) == 1
