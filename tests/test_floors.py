"""Who may import whom: docs/architecture.md as a test.

It reads imports as text, wherever they stand: one inside a function counts like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "firstboot"

# Floor 0, in the order in which they may import one another.
PROTOCOL = (
    "errors",
    "record",
    "model",
    "credentials",
    "messages",
    "plan",
    "events",
    "election",
    "enrolment",
    "peers",
    "hubs",
    "situation",
    "voter",
    "membership",
    "supplying",
    "assembly",
    "status",
    "history",
)
PURE = {"__future__", "base64", "collections", "dataclasses", "enum", "ipaddress", "json"}
PURE |= {"bisect", "heapq", "itertools", "operator", "re", "string", "types", "typing"}
ADAPTERS = ("containers", "discovery", "health", "host", "pki", "transport", "units", "userdata")
# What each may import beside the core: three adapters, then floors 2 and 3.
UPPER = {
    "discovery": {"web"},
    "health": {"web"},
    "userdata": {"web"},
    "web": set(),
    "payloads": set(),
    "journal": set(),
    "late": set(),
    "supply": {"host", "pki"},
    "deeds": {"container_units", "containers", "health", "host", "units"},
    "carrier": {"deeds", "host", "pki", "supply", "transport"},
    "greeting": {"host"},
    "publisher": {"discovery", "greeting", "host", "journal"},
    "named": {"host", "publisher", "userdata"},
    "replay": {"payloads"},
    "preview": {"payloads", "userdata"},
    "service": {
        *ADAPTERS,
        "carrier",
        "journal",
        "late",
        "named",
        "payloads",
        "publisher",
        "scrub",
        "whereabouts",
    },
    "admission": {"host", "journal", "pki", "publisher", "service", "units", "userdata"},
    "scrub": {"host", "userdata"},
    "seal": {
        "container_units",
        "containers",
        "greeting",
        "host",
        "payloads",
        "scrub",
        "units",
        "userdata",
    },
    "afterwards": {"greeting", "host", "journal", "scrub", "seal"},
    "whereabouts": {"discovery", "host", "journal", "publisher", "userdata"},
    "words": {"host", "units", "userdata"},
    "container_units": {"containers", "units"},
    "container_verbs": {"container_units", "containers"},
    "cli": {
        "admission",
        "afterwards",
        "container_verbs",
        "late",
        "preview",
        "replay",
        "seal",
        "service",
        "userdata",
        "words",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
# One third-party dependency, one file; cryptography: one adapter.
THIRD_PARTY = {
    "yaml": {"userdata/reading.py"},
    "fastjsonschema": {"userdata/rules.py"},
    "cryptography": {"pki/cluster.py", "pki/parts.py", "pki/sealing.py", "pki/signers.py"},
    "zeroconf": {"discovery/mdns.py"},
    "dns": {"discovery/dns.py"},
    "dbus": {"units.py"},
    "systemd": {"journal.py"},
    "botocore": {"discovery/ec2.py"},
}


def imports(source: str) -> Iterator[str]:
    """Every module a source text imports, `from a import b` as ``a.b`` when that is ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            ours = node.module in ("firstboot", "firstboot.protocol")
            yield from (f"{node.module}.{a.name}" if ours else node.module for a in node.names)


def wrong(path: str, source: str) -> list[str]:
    """What a file imports though it may not; `path` is relative to the package."""
    part = path.removesuffix(".py").split("/")
    return [name for name in imports(source) if not _allowed(path, part, name.split("."))]


def _allowed(path: str, part: list[str], name: list[str]) -> bool:
    top = name[0]
    if top != "firstboot":
        if part[0] == "protocol":
            return top in PURE
        return top in sys.stdlib_module_names or path in THIRD_PARTY.get(top, ())
    floor = name[1] if len(name) > 1 else ""
    if part[0] == "protocol":
        mine = PROTOCOL.index(part[1]) if part[1] != "__init__" else 0
        return floor == "protocol" and name[2] in PROTOCOL[:mine]
    if floor in ("protocol", part[0]):
        return True
    return floor in UPPER.get(part[0], set())


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_to_the_floors(path: Path) -> None:
    assert wrong(str(path.relative_to(PACKAGE)), path.read_text()) == []


def test_every_module_has_a_floor() -> None:
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in sources()}
    assert names == {"protocol", *ADAPTERS, *UPPER}
    assert {p.stem for p in (PACKAGE / "protocol").glob("*.py")} == {"__init__", *PROTOCOL}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("protocol/election.py", "import time"),
        ("protocol/election.py", "from firstboot.protocol import assembly"),
        ("protocol/model.py", "from firstboot import pki"),
        ("pki/cluster.py", "from firstboot import transport"),
        ("host/facts.py", "import yaml"),
        ("transport/tunnel.py", "from cryptography import x509"),
        ("units.py", "from firstboot.service import Service"),
        ("words.py", "import requests"),
    ],
)
def test_the_rules_are_noticed_when_broken(path: str, line: str) -> None:
    assert wrong(path, f"def f():\n    {line}\n")
