"""What all hosts must share is hashed; importing is cheap."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from firstboot import userdata
from firstboot.userdata import make_token, parse
from firstboot.userdata.token import assemble

TOKEN = assemble("7q0hzk3n5x9wbfcyd2rt8gjm4v6sape1")
BASE = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"


def agreed(extra: str = "", base: str = BASE) -> str:
    return parse(f"{base}{extra}".encode(), "c.yaml").config.agreed


@pytest.mark.parametrize(
    "extra",
    [
        "masters: 3",
        "payload: none",
        "etcd: {image: 'oci:/other:1'}",
        "election: {strict: true}",
        "election: {grace: 121s}",
        "join: {extra: 1}",
        "join: {extra: unlimited}",
        "join: {window: 1h}",
        "formation: second",
    ],
)
def test_shared_keys_change_the_hash(extra: str) -> None:
    assert agreed(extra) != agreed()


@pytest.mark.parametrize(
    "extra",
    [
        "masters: 1",
        "election: {grace: 2m, strict: false}",
        "join: {window: 1d, extra: 0}",
        "formation: ''",
        "network: {interface: eth1, port: 7000}",
        "discovery: [{static: [10.0.0.5]}]",
        "election: {prefer: [{launch_index: 0}], never: [{hostname: n1}]}",
    ],
)
def test_other_keys_and_spellings_do_not(extra: str) -> None:
    assert agreed(extra) == agreed()


def test_hash_is_not_of_the_token() -> None:
    assert agreed(base=BASE.replace(TOKEN, make_token())) == agreed()


def test_hash_is_the_same_in_every_release() -> None:
    """Hosts of two releases must be able to meet; change this only with the protocol's version."""
    assert agreed() == "5378e55582ccb2876e466b6d77eef18da0bc7c98a2a84fc93af92c4de7859816"


def test_importing_loads_neither_yaml_nor_fastjsonschema() -> None:
    """Both cost more to load than the rest of a short command; only functions import them."""
    eager: set[str] = set()
    late: set[str] = set()
    for path in Path(userdata.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                (eager if node in tree.body else late).update(names)
    assert not eager & {"yaml", "fastjsonschema", "urllib", "secrets"}
    assert late >= {"yaml", "fastjsonschema", "secrets"}
