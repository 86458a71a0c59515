"""On a real API server: `make chart-cluster` builds it."""

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helm.tools import manifests
from helm.tools.check import Chart
from helm.tools.cluster import Api, Cluster, Refused, api_server, lives, run
from hybrid.errors import ConfigError
from hybrid.local.process import default_cache

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[Api]:
    """One for all tests, with the custom kinds; each has a namespace of its own."""
    with api_server(default_cache(), tmp_path_factory.mktemp("server")) as api:
        for file in sorted((Path(__file__).parents[2] / "crds-for-tests").glob("*.yaml")):
            for definition in manifests.read(file.read_text()):
                api.define(definition)
        yield api


@pytest.fixture
def namespace() -> str:
    return f"test-{next(NUMBERS)}"


@pytest.fixture
def changed(folder: Path) -> None:
    (folder.parent / "upgrade.yaml").write_text('image: {tag: "2.0"}\n')


@pytest.fixture
def live(api: Api, chart: Chart, tmp_path: Path, changed, namespace: str):
    """What is found in the life of a release of the chart with a file of its values."""

    def findings(values: str) -> list[str]:
        (life,) = [each for each in lives(chart, tmp_path / "previous") if each.name == f"ci/{values}.yaml"]
        found = Cluster(api, chart, tmp_path / "helm").live(life, namespace)
        return [f"{each.where}: {each.what}" for each in found]

    return findings


@pytest.mark.parametrize("values", ["default", "everything"])
def test_a_release_lives_and_leaves_only_what_it_keeps(live, values: str):
    """With everything it has a claim that is kept, and an object of a custom kind."""
    assert live(values) == []


def test_a_pod_that_breaks_restricted_is_refused(live, plant):
    """By the API server's admission, for the first install and for the upgrade."""
    plant("templates/deployment.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true")
    found = live("default")
    assert len(found) == 2
    assert all('violates PodSecurity "restricted' in each for each in found)


def test_an_object_that_the_api_server_refuses_is_named(live, plant):
    """What no schema says: a selector must match the template's labels."""
    plant(
        "templates/deployment.yaml",
        "matchLabels:\n      {{- include",
        "matchLabels:\n      other: label\n      {{- include",
    )
    (found,) = live("default")
    assert "`selector` does not match template `labels`" in found


def test_an_upgrade_that_changes_a_selector_is_refused(live, plant):
    """It is for ever."""
    plant("templates/_names.tpl", "{{ .Chart.Name }}", "{{ .Chart.Name }}-{{ .Values.image.tag }}")
    (found,) = live("default")
    assert "field is immutable" in found


def test_an_upgrade_that_changes_nothing_proves_nothing(live, folder: Path):
    """Values that the chart has anyway."""
    (folder.parent / "upgrade.yaml").write_text('image: {tag: "1.0"}\n')
    assert live("default") == ["ci/default.yaml: the upgrade changed nothing"]


def test_an_object_that_outlives_its_release_is_found(live, plant):
    """A hook's objects are nobody's: Helm leaves them."""
    hook = "name: {{ .Release.Name }}\n  annotations: {helm.sh/hook: post-install}\nspec:\n  minAvailable"
    plant("templates/beside.yaml", "name: {{ .Release.Name }}\nspec:\n  minAvailable", hook)
    assert live("default") == [
        "ci/default.yaml PodDisruptionBudget/hybrid: is still there after the release was removed"
    ]


def test_a_release_of_the_previous_version_is_upgraded_to_the_chart(
    api: Api, chart: Chart, plant, tmp_path: Path, changed, namespace: str
):
    """Each of its files of values, to the chart's of the same name."""
    (tmp_path / "previous").mkdir()
    with tarfile.open(tmp_path / "previous/small-0.0.9.tgz", "w:gz") as package:
        package.add(chart.folder, arcname="small")
    plant("values.yaml", "replicas: 2", "replicas: 4")
    named = {each.name: each for each in lives(chart, tmp_path / "old")}
    assert list(named)[2:] == ["small-0.0.9 ci/default.yaml", "small-0.0.9 ci/everything.yaml"]
    assert Cluster(api, chart, tmp_path / "helm").live(named["small-0.0.9 ci/default.yaml"], namespace) == []


def test_a_chart_without_values_that_an_upgrade_changes_is_refused(chart: Chart, tmp_path: Path):
    """And the message says which file is missing."""
    with pytest.raises(ConfigError, match=r"upgrade\.yaml must hold the values that an upgrade changes"):
        lives(chart, tmp_path)


def test_what_is_not_the_administrator_is_not_answered(api: Api):
    """The token is the only way in."""
    stranger = Api(str(api._client.base_url), "wrong", api.kubeconfig.with_name("server.crt"), api.kubeconfig)
    with pytest.raises(Refused):
        stranger.call("GET", "/api/v1/namespaces")
    stranger.close()


def test_every_file_of_values_is_lived_without_and_with_the_custom_kinds(chart: Chart, changed):
    """What needs a kind that is not there is refused by its name. No process is left."""
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    results = list(run(chart))
    assert [(each.step, each.note) for each in results] == [
        ("start", "Kubernetes 1.34.2"),
        ("without", "ci/default.yaml"),
        ("without", "ci/everything.yaml, refused without ScaledObject"),
        ("kinds", "7 custom kinds"),
        ("with", "ci/default.yaml"),
        ("with", "ci/everything.yaml"),
    ]
    assert [finding for each in results for finding in each.findings] == []
    assert {each.pid for each in psutil.Process().children(recursive=True)} == before
