"""`firstboot plan`: everything a host would get, as data, and no secret in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from firstboot import cli
from firstboot.userdata import make_token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "o.yaml"
    text = f"cluster: demo\ntoken: {make_token()}\nexpect: 3\npayload: origin\n"
    path.write_text(text + "origin: {kubelet_arguments: {cgroup-driver: [cgroupfs]}}\n")
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_yaml_holds_every_file_as_it_would_be(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, str(file), "--role", "master", "--format", "yaml", "--name", "m")
    plan = yaml.safe_load(text)
    files = {s["path"]: s for s in plan["steps"] if s["kind"] == "WriteFile"}
    config = yaml.safe_load(files["/etc/origin/master/master-config.yaml"]["content"])
    assert config["kubernetesMasterConfig"]["masterIP"] == "192.0.2.11"
    node = yaml.safe_load(files["/etc/origin/node/node-config.yaml"]["content"])
    assert (node["nodeName"], node["kubeletArguments"]) == ("m", {"cgroup-driver": ["cgroupfs"]})
    assert files["/etc/origin/master/ca.key"] == {
        "what": "write /etc/origin/master/ca.key",
        "kind": "WriteFile",
        "path": "/etc/origin/master/ca.key",
        "credential": "ca.key",
        "mode": "0600",
    }
    assert "PRIVATE KEY" not in text and "fb1-" not in text
    assert {c["name"] for c in plan["certificates"]} >= {"master.server", "node.client"}
    assert "content: |" in text  # files as they stand, not with escaped ends of lines


def test_json_says_the_same(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(file), "--role", "node")
    as_json = json.loads(shown(capsys, *words, "--format", "json"))
    assert as_json == yaml.safe_load(shown(capsys, *words, "--format", "yaml"))
    lines = shown(capsys, *words).splitlines()
    assert len(lines) == len(as_json["steps"])
    assert lines[0].split(maxsplit=1) == ["1", "get this host's certificates from the master"]


@pytest.mark.parametrize("payload", ["etcd", "none", "origin"])
@pytest.mark.parametrize("role", ["master", "node"])
@pytest.mark.parametrize("masters", [1, 3])
def test_every_payload_has_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], payload: str, role: str, masters: int
) -> None:
    path = tmp_path / "x.yaml"
    head = f"cluster: demo\ntoken: {make_token()}\nexpect: 4\n"
    path.write_text(f"{head}payload: {payload}\nmasters: {masters}\n")
    plan: dict[str, Any] = yaml.safe_load(shown(capsys, str(path), "--role", role, "--format=yaml"))
    assert plan["role"] == role
    assert plan["steps"][-1]["kind"] == "ReachTarget"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--name", "Not A Name"], 64, "is not a DNS label"),
        (["--address", "here"], 64, "does not appear to be an IPv4 or IPv6 address"),
        (["--role", "king"], 64, "invalid choice"),
    ],
)
def test_mistakes(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    assert cli.main(["plan", str(file), *words]) == code
    assert says in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/nowhere.yaml"]) == 64
    assert "no such file" in capsys.readouterr().err
