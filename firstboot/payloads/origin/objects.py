"""The router and the registry, as objects the founding master creates once the API answers.

They are what `oc adm router` and `oc adm registry` of Origin 3.9 make, and openshift-ansible with
them, with one difference: the router's right to its host's network is a constraint of its own
instead of a line in one that exists, so that nothing has to be changed, only created.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from firstboot.payloads.origin.certificates import MASTER_DIRECTORY
from firstboot.protocol.plan import CreateObject

NAMESPACE = "default"
ROUTER, REGISTRY = "router", "docker-registry"
REGISTRY_PORT = 5000
REGISTRY_HOST = f"{REGISTRY}.{NAMESPACE}.svc"
SERVING = "service.alpha.openshift.io/serving-cert-secret-name"  # Origin then makes that secret
SELECTOR = '"${infra_selector}"'  # JSON of its own, put in without the quotes
# Where each kind is made: its API, its resource, and whether it is in a namespace.
KINDS = {
    "ServiceAccount": ("/api/v1", "serviceaccounts", True),
    "Secret": ("/api/v1", "secrets", True),
    "Service": ("/api/v1", "services", True),
    "DeploymentConfig": ("/apis/apps.openshift.io/v1", "deploymentconfigs", True),
    "Route": ("/apis/route.openshift.io/v1", "routes", True),
    "ClusterRoleBinding": ("/apis/authorization.openshift.io/v1", "clusterrolebindings", False),
    "SecurityContextConstraints": (
        "/apis/security.openshift.io/v1",
        "securitycontextconstraints",
        False,
    ),
}
Tree = dict[str, Any]


def objects() -> Iterator[CreateObject]:
    """What is created on the founding master, in order."""
    for tree in (*_router(), *_access("router"), *_deployed_router()):
        yield _create(tree, "${router_here}")
    for tree in (*_registry(), *_access("registry"), *_deployed_registry()):
        yield _create(tree, "${registry_here}")


def _create(tree: Tree, when: str) -> CreateObject:
    kind, name = tree["kind"], tree["metadata"]["name"]
    prefix, resource, inside = KINDS[kind]
    where = f"{prefix}/namespaces/{NAMESPACE}" if inside else prefix
    admin = f"{MASTER_DIRECTORY}/admin"
    content = json.dumps(tree | {"apiVersion": prefix.removeprefix("/apis/").removeprefix("/api/")})
    return CreateObject(
        f"https://${{loopback}}{where}/{resource}",
        f"{kind} {name}",
        content.replace(SELECTOR, "${infra_selector}"),
        f"{MASTER_DIRECTORY}/ca.crt",
        f"{admin}.crt",
        f"{admin}.key",
        when=when,
    )


def _tree(kind: str, name: str, labels: Tree | None = None, **more: Any) -> Tree:
    metadata: Tree = {"name": name} | ({"labels": labels} if labels else {})
    return {"kind": kind, "metadata": metadata, **more}


def _access(account: str) -> Iterator[Tree]:
    """A service account, with the role Origin has for it."""
    yield _tree("ServiceAccount", account)
    subject = {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
    yield _tree(
        "ClusterRoleBinding",
        f"{account}-{account}-role",
        roleRef={"name": f"system:{account}"},
        subjects=[subject],
        userNames=[f"system:serviceaccount:{NAMESPACE}:{account}"],
        groupNames=None,
    )


def _deployment(
    app: str, account: str, labels: Tree, container: Tree, volumes: list[Tree], **more: Any
) -> Tree:
    """A DeploymentConfig of one pod, made anew whenever it changes."""
    pod = {
        "serviceAccountName": account,
        "nodeSelector": "${infra_selector}",
        "containers": [container],
        "volumes": volumes,
        **more,
    }
    return _tree(
        "DeploymentConfig",
        app,
        labels,
        spec={
            "replicas": 1,
            "selector": labels,
            "strategy": {"type": "Rolling"},
            "triggers": [{"type": "ConfigChange"}],
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    )


def _env(**values: str) -> list[Tree]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _probe(path: str, port: int, **more: Any) -> Tree:
    return {"httpGet": {"path": path, "port": port, **more}, "timeoutSeconds": 5}


def _ports(*numbers: int) -> list[Tree]:
    return [{"name": f"{n}-tcp", "port": n, "targetPort": n, "protocol": "TCP"} for n in numbers]


# ---------------------------------------------------------------- the router

_ROUTER_LABELS = {ROUTER: ROUTER}


def _router() -> Iterator[Tree]:
    yield _tree(
        "SecurityContextConstraints",
        "firstboot-router",
        priority=None,
        allowHostDirVolumePlugin=False,
        allowHostIPC=False,
        allowHostNetwork=True,
        allowHostPID=False,
        allowHostPorts=True,
        allowPrivilegedContainer=False,
        allowedCapabilities=None,
        defaultAddCapabilities=None,
        requiredDropCapabilities=["KILL", "MKNOD", "SETUID", "SETGID"],
        readOnlyRootFilesystem=False,
        runAsUser={"type": "MustRunAsRange"},
        seLinuxContext={"type": "MustRunAs"},
        fsGroup={"type": "MustRunAs"},
        supplementalGroups={"type": "MustRunAs"},
        volumes=["configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "secret"],
        users=[f"system:serviceaccount:{NAMESPACE}:{ROUTER}"],
        groups=[],
    )


def _deployed_router() -> Iterator[Tree]:
    service = _tree(
        "Service",
        ROUTER,
        _ROUTER_LABELS,
        spec={"selector": _ROUTER_LABELS, "ports": _ports(80, 443, 1936)},
    )
    service["metadata"]["annotations"] = {SERVING: "router-certs"}
    yield service
    container = {
        "name": ROUTER,
        "image": "${origin_images_router}",
        "imagePullPolicy": "IfNotPresent",
        "env": _env(
            DEFAULT_CERTIFICATE_DIR="/etc/pki/tls/private",
            DEFAULT_CERTIFICATE_PATH="/etc/pki/tls/private/tls.crt",
            ROUTER_LISTEN_ADDR="0.0.0.0:1936",
            ROUTER_METRICS_TYPE="haproxy",
            ROUTER_SERVICE_HTTP_PORT="80",
            ROUTER_SERVICE_HTTPS_PORT="443",
            ROUTER_SERVICE_NAME=ROUTER,
            ROUTER_SERVICE_NAMESPACE=NAMESPACE,
            ROUTER_SUBDOMAIN="",
            ROUTER_THREADS="0",
            STATS_PORT="1936",
            STATS_USERNAME="admin",
        ),
        "ports": [
            {"containerPort": 80, "hostPort": 80, "protocol": "TCP"},
            {"containerPort": 443, "hostPort": 443, "protocol": "TCP"},
            {"containerPort": 1936, "hostPort": 1936, "protocol": "TCP", "name": "stats"},
        ],
        "livenessProbe": _probe("/healthz", 1936, host="localhost") | {"initialDelaySeconds": 10},
        "readinessProbe": _probe("/healthz/ready", 1936, host="localhost")
        | {"initialDelaySeconds": 10},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [
            {"name": "server-certificate", "mountPath": "/etc/pki/tls/private", "readOnly": True}
        ],
    }
    volume = {"name": "server-certificate", "secret": {"secretName": "router-certs"}}
    yield _deployment(ROUTER, ROUTER, _ROUTER_LABELS, container, [volume], hostNetwork=True)


# ---------------------------------------------------------------- the registry

_REGISTRY_LABELS = {REGISTRY: "default"}


def _registry() -> Iterator[Tree]:
    data = {f"registry.{half}": f"@{{base64:registry.{half}}}" for half in ("crt", "key")}
    yield _tree("Secret", "registry-certificates", type="Opaque", data=data)


def _deployed_registry() -> Iterator[Tree]:
    yield _tree(
        "Service",
        REGISTRY,
        _REGISTRY_LABELS,
        spec={
            "selector": _REGISTRY_LABELS,
            "ports": _ports(REGISTRY_PORT),
            "sessionAffinity": "ClientIP",
        },
    )
    https = {"scheme": "HTTPS"}
    container = {
        "name": "registry",
        "image": "${origin_images_registry}",
        "imagePullPolicy": "IfNotPresent",
        "env": _env(
            REGISTRY_HTTP_ADDR=f":{REGISTRY_PORT}",
            REGISTRY_HTTP_NET="tcp",
            REGISTRY_HTTP_TLS_CERTIFICATE="/etc/secrets/registry.crt",
            REGISTRY_HTTP_TLS_KEY="/etc/secrets/registry.key",
            REGISTRY_MIDDLEWARE_REPOSITORY_OPENSHIFT_ENFORCEQUOTA="false",
            REGISTRY_OPENSHIFT_SERVER_ADDR=f"{REGISTRY_HOST}:{REGISTRY_PORT}",
        ),
        "ports": [{"containerPort": REGISTRY_PORT, "protocol": "TCP"}],
        "livenessProbe": _probe("/healthz", REGISTRY_PORT, **https) | {"initialDelaySeconds": 10},
        "readinessProbe": _probe("/healthz", REGISTRY_PORT, **https),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [
            {"name": "registry-storage", "mountPath": "/registry"},
            {"name": "registry-certificates", "mountPath": "/etc/secrets"},
        ],
    }
    volumes = [
        {"name": "registry-storage", "emptyDir": {}},
        {
            "name": "registry-certificates",
            "secret": {"secretName": "registry-certificates"},
        },
    ]
    yield _deployment(REGISTRY, "registry", _REGISTRY_LABELS, container, volumes)
    yield _tree(
        "Route",
        REGISTRY,
        spec={
            "to": {"kind": "Service", "name": REGISTRY},
            "tls": {"termination": "passthrough"},
        },
    )
