import json
import tarfile
from pathlib import Path

import pytest

from helm.tools import check
from helm.tools.check import STEPS, Chart, Finding, main

REASON = "the tests of this module exclude what they do not ask for"


def findings(chart: Chart, step: str) -> list[Finding]:
    (result,) = check.run(chart, [step])
    return list(result.findings)


@pytest.mark.parametrize("step", STEPS)
def test_a_chart_with_nothing_wrong_passes(chart: Chart, step: str):
    """Each step, alone."""
    chart.write = step in {"readme", "unittest"}  # the small chart has neither README nor snapshots
    assert findings(chart, step) == []


def test_a_value_that_the_schema_lacks_is_found(chart: Chart, plant):
    """By `schema`, with its path."""
    plant("values.yaml", "podAnnotations", "podLabels")
    assert {each.what.split(":")[0] for each in findings(chart, "schema")} >= {"podAnnotations", "podLabels"}


def test_a_value_that_no_file_of_values_sets_is_found(chart: Chart, plant):
    """By `coverage`."""
    plant("ci/everything.yaml", ', tag: "1.1"', "")
    assert [each.what for each in findings(chart, "coverage")] == ["no file sets image.tag"]


def test_an_unknown_key_in_a_file_of_values_is_found(chart: Chart, folder: Path):
    """By `lint`, which reads values as an install does; the render that needs them is refused too."""
    (folder / "ci/typo.yaml").write_text("replcas: 3\n")
    (found,) = findings(chart, "lint")
    assert (found.where, "replcas" in found.what) == ("ci/typo.yaml", True)
    assert any("replcas" in each.what for each in findings(chart, "valid"))


def test_a_renamed_key_in_a_file_of_values_is_refused(chart: Chart, folder: Path):
    """An install must not go on without what the old name asked for."""
    (folder / "ci/old.yaml").write_text("replicaCount: 3\n")
    (found,) = findings(chart, "lint")
    assert "replicaCount" in found.what


def test_a_readme_that_drifted_is_found(chart: Chart, folder: Path, plant):
    """By `readme`, with the lines that differ; `--write` mends it."""
    chart.write = True
    assert findings(chart, "readme") == []
    chart.write = False
    plant("values.yaml", "How many pods answer.", "How many pods there are.")
    (found,) = findings(chart, "readme")
    assert "How many pods there are." in found.what
    chart.write = True
    assert findings(chart, "readme") == []
    assert "How many pods there are." in (folder / "README.md").read_text()


def test_a_value_without_a_comment_is_found(chart: Chart, plant):
    """By `readme`, by name. A comment on a map is one for all that is in it."""
    chart.write = True
    plant("values.yaml", "  # -- Its version.\n", "")
    assert [each.what for each in findings(chart, "readme")] == ["image.tag has no comment"]
    plant("values.yaml", "image:", "# -- The image of the pods.\nimage:")
    assert findings(chart, "readme") == []


def test_a_suite_that_fails_is_found(chart: Chart, plant):
    """By `unittest`, with what it said."""
    plant("tests/deployment_test.yaml", "value: 5", "value: 6")
    (found,) = findings(chart, "unittest")
    assert "has as many pods as values say" in found.what


def test_a_snapshot_that_is_missing_or_changed_is_found(chart: Chart, plant):
    """helm-unittest alone would write the missing one and pass."""
    (missing,) = findings(chart, "unittest")
    assert missing.where == "tests/__snapshot__/deployment_test.yaml.snap"
    chart.write = True
    assert findings(chart, "unittest") == []
    chart.write = False
    assert findings(chart, "unittest") == []
    plant("templates/_names.tpl", "app.kubernetes.io/instance", "app.kubernetes.io/component")
    assert len(findings(chart, "unittest")) == 1


def test_an_unknown_field_is_found_with_the_kubernetes_versions_that_refuse_it(chart: Chart, plant):
    """By `valid`: three versions, two files of values."""
    plant("templates/deployment.yaml", "automountServiceAccountToken: false", "automountToken: false")
    found = findings(chart, "valid")
    assert [each.where for each in found] == [
        "ci/default.yaml Deployment/hybrid",
        "ci/everything.yaml Deployment/hybrid",
    ]
    assert all(each.what.startswith("Kubernetes 1.29, 1.34, 1.37: spec.template.spec: ") for each in found)
    assert all("automountToken" in each.what for each in found)


def test_a_field_that_only_newer_kubernetes_versions_have_is_found(chart: Chart, plant):
    """Pod level `resources` came after 1.29."""
    plant("templates/deployment.yaml", "automountServiceAccountToken: false", "resources: {requests: {cpu: 1}}")
    assert {each.what.split(":")[0] for each in findings(chart, "valid")} == {"Kubernetes 1.29"}


def test_an_object_that_is_there_twice_is_found(chart: Chart, plant):
    """The second would overwrite the first."""
    plant("templates/beside.yaml", "kind: NetworkPolicy", "kind: PodDisruptionBudget")
    assert any("twice" in each.what for each in findings(chart, "valid"))


def test_a_kind_that_no_definition_declares_is_found(chart: Chart, plant):
    """By `valid`: nothing is passed over."""
    plant("templates/beside.yaml", "kind: ScaledObject", "kind: ScaledThing")
    assert {each.where for each in findings(chart, "valid")} == {"ci/everything.yaml ScaledThing/hybrid"}


def test_a_pod_that_breaks_restricted_is_found(chart: Chart, plant):
    """By `restricted`, with the container and the field."""
    plant("templates/deployment.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true")
    assert {each.what for each in findings(chart, "restricted")} == {
        "small: securityContext.allowPrivilegeEscalation must be false"
    }


def test_what_kube_score_says_is_found_unless_it_is_excluded_with_a_reason(chart: Chart, plant):
    """An exclusion for other objects does not help, and one that nothing needs is an error."""
    plant("templates/deployment.yaml", "imagePullPolicy: Always", "imagePullPolicy: IfNotPresent")
    assert {each.what.split(":")[0] for each in findings(chart, "score")} == {"container-image-pull-policy"}
    lint, others = chart.beside / "lint.toml", (chart.beside / "lint.toml").read_text()
    exclusion = f'{others}[[exclude]]\ncheck = "container-image-pull-policy"\nreason = "{REASON}"\nobject = '
    lint.write_text(f'{exclusion}"Deployment/*"\n')
    assert findings(chart, "score") == []
    lint.write_text(f'{exclusion}"Deployment/*"\nsays = "not set to Always"\n')
    assert findings(chart, "score") == []
    lint.write_text(f'{exclusion}"StatefulSet/*"\n')
    assert len(findings(chart, "score")) == 3  # one for each file of values, and the exclusion


def test_an_exclusion_without_a_reason_is_refused(chart: Chart):
    """So that the next reader need not guess."""
    (chart.beside / "lint.toml").write_text('[[exclude]]\ncheck = "pod-probes"\n')
    (found,) = findings(chart, "score")
    assert "must have check and reason" in found.what


def test_a_function_that_gives_another_answer_each_time_is_found(chart: Chart, plant):
    """By its line; the render differs too. In comments, strings and names the word is no function."""
    plant(
        "templates/_names.tpl",
        "{{ .Release.Name }}",
        '{{ .Release.Name }}{{/* now */}}{{ "" | default "now" | trunc 0 }}',
    )
    assert findings(chart, "repeatable") == []
    plant("templates/_names.tpl", "{{ .Chart.Name }}", "{{ randAlphaNum 5 | lower }}")
    found = findings(Chart(chart.folder, chart.cache), "repeatable")
    assert [each.where for each in found] == ["templates/_names.tpl:2", "ci/default.yaml", "ci/everything.yaml"]


def test_lookup_is_found(chart: Chart, plant):
    """It answers nothing where there is no cluster, so two renders are alike and yet wrong."""
    plant("templates/_names.tpl", "{{ .Chart.Name }}", '{{ .Chart.Name }}{{ (lookup "v1" "Secret" "a" "b").data }}')
    assert ["lookup" in each.what for each in findings(chart, "repeatable")] == [True]


def test_an_upgrade_that_kubernetes_would_refuse_is_found(
    chart: Chart, folder: Path, plant, tmp_path: Path, monkeypatch
):
    """From the package in `previous`: a selector is for ever. Other changes are shown in a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "previous").mkdir()
    with tarfile.open(tmp_path / "previous/small-0.0.9.tgz", "w:gz") as package:
        package.add(folder, arcname="small")
    plant("values.yaml", "replicas: 2", "replicas: 4")
    assert [each.where for each in findings(chart, "upgrade")] == ["Chart.yaml"]  # the version is still the old one
    plant("Chart.yaml", "version: 0.1.0", "version: 0.2.0")
    assert findings(chart, "upgrade") == []
    assert "+  replicas: 4" in (tmp_path / "build/chart-upgrade/default.yaml.diff").read_text()
    plant("templates/_names.tpl", "app.kubernetes.io/name", "app")
    assert {each.what for each in findings(Chart(folder, chart.cache), "upgrade")} == {
        "spec.selector changes, which Kubernetes refuses in an upgrade"
    }


def test_the_command_says_what_is_wrong_and_how_to_mend_it(folder: Path, plant, tmp_path: Path, capsys):
    """Its exit status is 1, and the JSON has the same."""
    plant("ci/everything.yaml", "replicas: 3", "")
    arguments = ["--chart", str(folder), "--only", "coverage", "--json", str(tmp_path / "out/chart.json")]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "FAIL  coverage" in said
    assert "ci: no file sets replicas\n        -> set it in ci/everything.yaml" in said
    (result,) = json.loads((tmp_path / "out/chart.json").read_text())
    assert (result["step"], len(result["findings"])) == ("coverage", 1)
    plant("ci/everything.yaml", "image:", "replicas: 3\nimage:")
    assert main(arguments) == 0
