"""The double's objects: what firstboot creates is taken, and each broken one refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import plan
from firstboot.protocol.model import Member, Value
from tests.origin import objects
from tests.origin.objects import Invalid, Store, Tree

ME = Member("a" * 32, "host-1", "10.77.0.11")
IMAGES = {"origin_images_router": "router:v1", "origin_images_registry": "registry:v1"}


def rows(**options: str) -> dict[str, tuple[str, Tree]]:
    """What a master creates: its name to the collection's path and the object, in order."""
    value = Value(1, "ab" * 32, (ME,), True, 3)
    known = {**OPTIONS["origin"], **IMAGES, **options}
    steps = plan.make_plan(PAYLOADS["origin"], value, ME, "demo", known)
    return {
        s.name: (s.url.partition(":8443/")[2], json.loads(s.content))
        for s in steps
        if isinstance(s, plan.CreateObject)
    }


def create(store: Store, path: str, tree: Tree) -> bool:
    for key in tree.get("data", {}):
        tree["data"][key] = "QQ=="  # a credential is put in when it is sent
    return objects.create(store, path, tree)


def until(name: str) -> Store:
    """What there is before that object is created."""
    store: Store = {}
    for each, (path, tree) in rows().items():
        if each == name:
            return store
        assert create(store, path, tree)
    raise AssertionError(f"nobody creates {name}")


def test_all_are_taken_in_their_order_and_once() -> None:
    store: Store = {}
    for path, tree in rows().values():
        assert objects.collection(path)
        assert create(store, path, tree)
        assert not create(store, path, tree)
    assert sum(map(len, store.values())) == len(rows()) + 1  # and the secret of the service


def test_without_images_there_are_none() -> None:
    assert rows(**dict.fromkeys(IMAGES, "")) == {}
    assert not any("registry" in name for name in rows(origin_images_registry=""))


def test_where_they_may_run() -> None:
    _, tree = rows(origin_infra_selector='{"region": "infra"}')["DeploymentConfig router"]
    assert tree["spec"]["template"]["spec"]["nodeSelector"] == {"region": "infra"}


def test_only_the_founding_master_creates_them() -> None:
    other = Member("b" * 32, "host-2", "10.77.0.12")
    third = Member("c" * 32, "host-3", "10.77.0.13")
    value = Value(1, "ab" * 32, (ME, other, third), True, 3)
    for me in (other, third):
        steps = plan.make_plan(
            PAYLOADS["origin"], value, me, "demo", {**OPTIONS["origin"], **IMAGES}
        )
        assert not any(isinstance(s, plan.CreateObject) for s in steps)
        assert not any("registry.key" in getattr(s, "path", "") for s in steps)


def at(*keys: str | int, value: Any) -> Callable[[Tree], None]:
    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


POD = ("spec", "template", "spec")
ROUTER, REGISTRY = "DeploymentConfig router", "DeploymentConfig docker-registry"
BROKEN: dict[str, tuple[str, Callable[[Tree], None], str]] = {
    "another kind": (ROUTER, at("kind", value="Deployment"), "DeploymentConfig apps.openshift.io"),
    "another API": ("Service router", at("apiVersion", value="v2"), "Service v1 is wanted"),
    "selects nothing": (ROUTER, at("spec", "selector", value={"x": "y"}), "does not select"),
    "a number": (ROUTER, at(*POD, "containers", 0, "env", 0, "value", value=1), "a text is wanted"),
    "no image": (REGISTRY, at(*POD, "containers", 0, "image", value=""), "no image"),
    "a selector": (ROUTER, at(*POD, "nodeSelector", value={"a": True}), "texts are wanted"),
    "a volume less": (REGISTRY, at(*POD, "volumes", value=[]), "are not what is mounted"),
    "no account": (ROUTER, at(*POD, "serviceAccountName", value="x"), "no x among serviceaccounts"),
    "no secret": (
        ROUTER,
        at(*POD, "volumes", 0, "secret", "secretName", value="x"),
        "no x among secrets",
    ),
    "the host's network": (REGISTRY, at(*POD, "hostNetwork", value=True), "may not use it"),
    "no selector": ("Service router", at("spec", "selector", value={}), "and a selector"),
    "no service": (
        "Route docker-registry",
        at("spec", "to", "name", value="x"),
        "there is no service x",
    ),
    "no role": (
        "ClusterRoleBinding router-router-role",
        at("roleRef", "name", value="admin"),
        "there is no role admin",
    ),
    "nobody": (
        "ClusterRoleBinding registry-registry-role",
        at("subjects", 0, "name", value="x"),
        "no service account x",
    ),
    "no strategy": (
        "SecurityContextConstraints firstboot-router",
        at("fsGroup", value={}),
        "fsGroup.type: Required value",
    ),
    "no answer": (
        "SecurityContextConstraints firstboot-router",
        at("allowHostPorts", value=None),
        "allowHostPorts: Required value",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_object_is_refused(what: str) -> None:
    name, change, message = BROKEN[what]
    path, tree = rows()[name]
    store = until(name)
    broken = copy.deepcopy(tree)
    change(broken)
    with pytest.raises(Invalid, match=message):
        create(store, path, broken)
    assert create(store, path, tree)


def test_a_secret_that_is_not_base64() -> None:
    path, tree = rows()["Secret registry-certificates"]
    tree["data"] = {"registry.crt": "QQ==", "registry.key": "not @ base64"}
    with pytest.raises(Invalid, match=r"data.registry.key: not base64"):
        objects.create({}, path, tree)


@pytest.mark.parametrize(
    "path",
    [
        "api/v1/services",
        "api/v1/namespaces/default/deploymentconfigs",
        "apis/apps.openshift.io/v1/namespaces/default/services",
        "apis/security.openshift.io/v1/namespaces/default/securitycontextconstraints",
        "api/v1/namespaces/default/things",
    ],
)
def test_a_collection_that_is_none(path: str) -> None:
    assert objects.collection(path) == ""
