"""What the double's API takes as objects: no more than the real one, and what works later.

The real API takes a pod's template whose secret or service account is not there, and no pod ever
starts; this refuses it at once.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

Tree = dict[str, Any]
Store = dict[str, dict[str, Tree]]  # a collection's path to what it holds, by name
SERVING = "service.alpha.openshift.io/serving-cert-secret-name"
CORE = "api/v1/namespaces"
# A collection's last part: its kind, and the API it is in.
KINDS = {
    "serviceaccounts": ("ServiceAccount", "v1"),
    "secrets": ("Secret", "v1"),
    "services": ("Service", "v1"),
    "deploymentconfigs": ("DeploymentConfig", "apps.openshift.io/v1"),
    "routes": ("Route", "route.openshift.io/v1"),
    "clusterrolebindings": ("ClusterRoleBinding", "authorization.openshift.io/v1"),
    "securitycontextconstraints": ("SecurityContextConstraints", "security.openshift.io/v1"),
}
GLOBAL = ("clusterrolebindings", "securitycontextconstraints")
ROLES = ("system:router", "system:registry")
STRATEGIES = ("runAsUser", "seLinuxContext", "fsGroup", "supplementalGroups")


class Invalid(Exception):
    """The object is not one that would work; the sentence says why."""


def collection(path: str) -> str:
    """The resource of a collection's path, "" if it is none."""
    *before, resource = path.split("/")
    kind, version = KINDS.get(resource, ("", ""))
    top = ["api", "v1"] if version == "v1" else ["apis", *version.split("/")]
    wanted = top if resource in GLOBAL else [*top, "namespaces", *before[-1:]]
    return resource if kind and before == wanted else ""


def create(store: Store, path: str, body: Tree) -> bool:
    """Keep the object; False if there is one of that name. Invalid if it is not in order."""
    resource = collection(path)
    kind, version = KINDS[resource]
    said = (body.get("kind"), body.get("apiVersion"))
    if said != (kind, version):
        raise Invalid(f"{said[0]} {said[1]} was sent where {kind} {version} is wanted")
    name = body["metadata"]["name"]
    if name in store.get(path, {}):
        return False
    if resource in _CHECKS:
        _CHECKS[resource](store, path.rpartition("/")[0], body)
    store.setdefault(path, {})[name] = body
    if secret := body["metadata"].get("annotations", {}).get(SERVING):
        # What the service serving signer, a controller, does with such a service.
        made = {"kind": "Secret", "metadata": {"name": secret}, "data": {}}
        namespace = path.split("/")[-2]
        store.setdefault(f"{CORE}/{namespace}/secrets", {})[secret] = made
    return True


def _secret(_store: Store, _where: str, body: Tree) -> None:
    for key, value in body["data"].items():
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise Invalid(f"data.{key}: not base64: {error}") from error


def _service(_store: Store, _where: str, body: Tree) -> None:
    names = [port["name"] for port in body["spec"]["ports"]]
    if not names or len(set(names)) != len(names) or not body["spec"]["selector"]:
        raise Invalid("spec: a service has ports of different names, and a selector")


def _deployment(store: Store, where: str, body: Tree) -> None:
    core = f"{CORE}/{where.split('/')[-1]}"
    spec, pod = body["spec"], body["spec"]["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    if not spec["selector"] or not spec["selector"].items() <= labels.items():
        raise Invalid("spec.template.metadata.labels: the selector does not select them")
    if not all(isinstance(v, str) for v in pod.get("nodeSelector", {}).values()):
        raise Invalid("spec.template.spec.nodeSelector: texts are wanted")
    mounted = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", ())}
    if mounted != {volume["name"] for volume in pod["volumes"]}:
        raise Invalid("spec.template.spec.volumes: are not what is mounted")
    for container in pod["containers"]:
        if not container["image"]:
            raise Invalid("spec.template.spec.containers: no image")
        for entry in container["env"]:
            if not isinstance(entry["value"], str):
                raise Invalid(f"env {entry['name']}: a text is wanted")
    secrets = [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v]
    for kind, names in (("secrets", secrets), ("serviceaccounts", [pod["serviceAccountName"]])):
        for name in names:
            if name not in store.get(f"{core}/{kind}", {}):
                raise Invalid(f"spec.template.spec: there is no {name} among {kind}")
    if pod.get("hostNetwork"):
        user = f"system:serviceaccount:{where.split('/')[-1]}:{pod['serviceAccountName']}"
        rules = store.get("apis/security.openshift.io/v1/securitycontextconstraints", {}).values()
        if not any(user in rule["users"] and rule["allowHostNetwork"] for rule in rules):
            raise Invalid(f"spec.template.spec.hostNetwork: {user} may not use it")


def _route(store: Store, where: str, body: Tree) -> None:
    to = body["spec"]["to"]["name"]
    if to not in store.get(f"{CORE}/{where.split('/')[-1]}/services", {}):
        raise Invalid(f"spec.to: there is no service {to}")


def _binding(store: Store, _where: str, body: Tree) -> None:
    if body["roleRef"]["name"] not in ROLES:
        raise Invalid(f"roleRef: there is no role {body['roleRef']['name']}")
    for subject in body["subjects"]:
        held = store.get(f"{CORE}/{subject['namespace']}/serviceaccounts", {})
        if subject["name"] not in held:
            raise Invalid(f"subjects: there is no service account {subject['name']}")


def _constraint(_store: Store, _where: str, body: Tree) -> None:
    for key in STRATEGIES:
        if not body.get(key, {}).get("type"):
            raise Invalid(f"{key}.type: Required value")
    for key in ("allowPrivilegedContainer", "allowHostNetwork", "allowHostPorts"):
        if not isinstance(body.get(key), bool):
            raise Invalid(f"{key}: Required value")


_CHECKS: dict[str, Callable[[Store, str, Tree], None]] = {
    "secrets": _secret,
    "services": _service,
    "deploymentconfigs": _deployment,
    "routes": _route,
    "clusterrolebindings": _binding,
    "securitycontextconstraints": _constraint,
}
