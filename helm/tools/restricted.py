"""Kubernetes' Pod Security Standard "restricted", asked of a pod without a cluster.

`helm.tools.cluster` has the API server's own admission judge the same pods; this
says it sooner, and with the field's name.

Source:
    https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
}  # fmt: skip
_PROFILES = {"RuntimeDefault", "Localhost"}


def violations(pod: Mapping[str, Any]) -> list[str]:
    """What keeps a pod from being admitted, each with the field that must change."""
    spec = pod["spec"]
    containers = [
        each for key in ("initContainers", "containers", "ephemeralContainers") for each in spec.get(key) or []
    ]
    return [*_of_pod(spec), *(f"{each['name']}: {what}" for each in containers for what in _of_container(each, spec))]


def _of_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} must not be true"
    for volume in spec.get("volumes") or []:
        for source in volume.keys() - {"name"} - _VOLUMES:
            yield f"volume {volume['name']} must not be a {source}"
    security = spec.get("securityContext") or {}
    for sysctl in security.get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield f"securityContext.sysctls must not set {sysctl['name']}"
    yield from _users(security)


def _of_container(container: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    security, pod = container.get("securityContext") or {}, spec.get("securityContext") or {}
    if security.get("privileged"):
        yield "securityContext.privileged must not be true"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation must be false"
    if (security.get("procMount") or "Default") != "Default":
        yield "securityContext.procMount must be Default"
    capabilities = security.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield "securityContext.capabilities.drop must have ALL"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "securityContext.capabilities.add may have NET_BIND_SERVICE only"
    if security.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "securityContext.runAsNonRoot must be true, here or for the pod"
    if (security.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in _PROFILES:
        yield "securityContext.seccompProfile.type must be RuntimeDefault or Localhost, here or for the pod"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"port {port['containerPort']} must have no hostPort"
    yield from _users(security)


def _users(security: Mapping[str, Any]) -> Iterator[str]:
    if security.get("runAsUser") == 0:
        yield "securityContext.runAsUser must not be 0"
    if (security.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield "securityContext.seccompProfile.type must not be Unconfined"
    if security.get("runAsNonRoot") is False:
        yield "securityContext.runAsNonRoot must not be false"
