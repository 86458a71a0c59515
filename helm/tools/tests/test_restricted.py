import copy

import pytest

from helm.tools.restricted import violations

GOOD = {
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "config", "configMap": {"name": "c"}}],
        "initContainers": [],
        "containers": [
            {
                "name": "one",
                "ports": [{"containerPort": 8080}],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
}


def with_change(path: str, value) -> dict:
    """GOOD with one field changed, or dropped where the value is None."""
    pod = copy.deepcopy(GOOD)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target = pod["spec"]
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
    elif isinstance(target, list):
        target.insert(last, value)
    else:
        target[last] = value
    return pod


def test_a_pod_that_keeps_to_restricted_is_admitted():
    """The example of Kubernetes' documentation, with volumes that it lists."""
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("hostNetwork", True, "hostNetwork"),
        ("hostPID", True, "hostPID"),
        ("hostIPC", True, "hostIPC"),
        ("volumes.0", {"name": "host", "hostPath": {"path": "/"}}, "hostPath"),
        ("securityContext.runAsNonRoot", None, "runAsNonRoot"),
        ("securityContext.runAsUser", 0, "runAsUser"),
        ("securityContext.seccompProfile", None, "seccompProfile"),
        ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}], "sysctls"),
        ("containers.0.securityContext", None, "allowPrivilegeEscalation"),
        ("containers.0.securityContext.privileged", True, "privileged"),
        ("containers.0.securityContext.procMount", "Unmasked", "procMount"),
        ("containers.0.securityContext.runAsUser", 0, "runAsUser"),
        ("containers.0.securityContext.runAsNonRoot", False, "runAsNonRoot"),
        ("containers.0.securityContext.seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
        ("containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}, "capabilities.drop"),
        ("containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "capabilities.add"),
        ("containers.0.ports.0", {"containerPort": 1, "hostPort": 1}, "hostPort"),
        ("initContainers.0", {"name": "first"}, "first: securityContext.allowPrivilegeEscalation"),
    ],
)
def test_a_pod_that_breaks_restricted_is_named(path: str, value, field: str):
    """Each control of the standard, by its field."""
    assert any(field in each for each in violations(with_change(path, value)))
