"""Where a host's configuration may lie, which place wins, and why there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from firstboot.protocol.errors import LocalError, UserError
from firstboot.userdata import Document, explain, find
from firstboot.userdata.token import assemble

TOKEN = assemble("7q0hzk3n5x9wbfcyd2rt8gjm4v6sape1")
BASE = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"
HINT = "; make one with: firstboot token"


def put(root: Path, name: str, text: str, mode: int = 0o600) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


CONFIG = "etc/firstboot/config.yaml"
COMBINED = "run/cloud-init/combined-cloud-config.json"
MERGED = "var/lib/cloud/instance/cloud-config.txt"
VENDORS = [f"var/lib/cloud/instance/{name}-cloud-config.txt" for name in ("vendor", "vendor2")]
STAGES = "run/cloud-init/status.json"


def found(root: Path) -> Document:
    document = find(root)
    assert document is not None
    return document


def test_nothing_at_all(tmp_path: Path) -> None:
    assert find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "# later\n", "---\n"])
def test_an_empty_file_says_nothing(tmp_path: Path, text: str) -> None:
    put(tmp_path, CONFIG, text)
    assert find(tmp_path) is None


def test_image_defaults_alone_configure_nothing(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/firstboot/config.d/00-defaults.yaml", "this: [is not even YAML")
    assert find(tmp_path) is None


def test_later_places_win_and_mappings_merge(tmp_path: Path) -> None:
    put(
        tmp_path,
        "usr/lib/firstboot/config.d/00.yaml",
        "masters: 3\nnetwork: {port: 1, interface: a, cidr: 10.0.0.0/8}\n"
        "election: {prefer: [{launch_index: 0}, {launch_index: 1}], grace: 1s}\n",
    )
    put(tmp_path, "usr/lib/firstboot/config.d/10.yaml", "network: {port: 2}\n")
    put(tmp_path, COMBINED, json.dumps({"firstboot": {"network": {"port": 3}, "formation": "x"}}))
    put(tmp_path, CONFIG, BASE + "network: {port: 4}\n")
    put(tmp_path, "etc/firstboot/config.d/20.yaml", "election: {prefer: [{launch_index: 2}]}\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "network: {port: 5, interface: b}\n")
    put(tmp_path, "etc/firstboot/config.d/.30.yaml", "network: {port: 6}\n")
    put(tmp_path, "etc/firstboot/config.d/30.yaml~", "network: {port: 7}\n")
    put(tmp_path, "run/firstboot/config.d/00.yaml", "network: {interface: c}\n")
    document = found(tmp_path)
    assert (document.port, document.interface, document.cidr) == (5, "c", "10.0.0.0/8")
    assert document.prefer == ({"launch_index": 2},)
    assert (document.config.masters, document.config.grace) == (3, 1.0)
    assert document.formation_id == "demo/x"
    assert document.sources == (
        "/usr/lib/firstboot/config.d/00.yaml",
        "/usr/lib/firstboot/config.d/10.yaml",
        "/run/cloud-init/combined-cloud-config.json",
        "/etc/firstboot/config.yaml",
        "/etc/firstboot/config.d/10.yaml",
        "/etc/firstboot/config.d/20.yaml",
        "/run/firstboot/config.d/00.yaml",
    )
    assert document.warnings == ()


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        find(root)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_position_is_that_of_the_file_that_said_it(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, BASE + "network:\n  port: 7000\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "network:\n  cidr: 10.0.0.1/8\n")
    put(tmp_path, "run/firstboot/config.d/10.yaml", "network:\n  interface: eth1\n")
    expected = (
        "/etc/firstboot/config.d/10.yaml:2:9: network.cidr names a host, not a network; "
        "write 10.0.0.0/8"
    )
    assert refused(tmp_path) == expected


def test_overridden_mistake_is_no_mistake(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, BASE + "masters: 2\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n")
    assert found(tmp_path).config.masters == 3


def test_missing_key_of_merged_documents(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, "cluster: demo\nexpect: 3\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n")
    assert refused(tmp_path) == f"/etc/firstboot/config.d/10.yaml:1:1: token is missing{HINT}"


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o640, True), (0o644, True)])
def test_readable_token_is_warned_about(tmp_path: Path, mode: int, warned: bool) -> None:
    put(tmp_path, CONFIG, BASE, mode)
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n", 0o644)
    expected = (
        "/etc/firstboot/config.yaml holds the token and others can read it: "
        "chmod 0600 /etc/firstboot/config.yaml",
    )
    assert found(tmp_path).warnings == (expected if warned else ())


def test_oversized_file_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, CONFIG, "")
    os.truncate(path, 1 << 40)  # sparse: reading it all would take for ever
    assert refused(tmp_path) == "/etc/firstboot/config.yaml: the document is larger than 1 MB"


def test_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "etc/firstboot").mkdir(parents=True)
    os.mkfifo(tmp_path / CONFIG)
    assert refused(tmp_path) == "/etc/firstboot/config.yaml: this is not a regular file"


def test_unreadable_place_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "etc/firstboot").mkdir(parents=True)
    (tmp_path / CONFIG).symlink_to("config.yaml")
    with pytest.raises(LocalError, match=r"cannot read /etc/firstboot/config\.yaml: Too many"):
        find(tmp_path)


# ---------------------------------------------------------------- cloud-init's merged result

SAID = {"cluster": "demo", "token": TOKEN, "expect": 3}


def test_combined_file_is_read(tmp_path: Path) -> None:
    put(tmp_path, COMBINED, json.dumps({"users": [], "firstboot": SAID}))
    document = found(tmp_path)
    assert document.config.cluster == "demo"
    assert document.sources == ("/run/cloud-init/combined-cloud-config.json",)


@pytest.mark.parametrize("whole", [{}, {"firstboot": None}, {"firstboot": {}}])
def test_combined_file_without_the_key(tmp_path: Path, whole: dict[str, Any]) -> None:
    put(tmp_path, COMBINED, json.dumps(whole))
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, MERGED, "#cloud-config\nfirstboot: {cluster: stale}\n")
    assert find(tmp_path) is None


def test_mistake_in_the_combined_file_names_the_key(tmp_path: Path) -> None:
    put(tmp_path, COMBINED, json.dumps({"firstboot": {**SAID, "network": {"port": 7443.0}}}))
    assert refused(tmp_path) == (
        "/run/cloud-init/combined-cloud-config.json, key firstboot: network.port must be a whole "
        "number from 1 to 65535, not '7443.0'; for example: port: 7443"
    )


@pytest.mark.parametrize("key", ['"\\ud800"', "[" * 40 + "]" * 40, '"a\\u0000"', '"word"'])
def test_strange_combined_key_is_a_mistake(tmp_path: Path, key: str) -> None:
    put(tmp_path, COMBINED, '{"firstboot": ' + key + "}")
    assert refused(tmp_path).startswith("/run/cloud-init/combined-cloud-config.json, key firstboot")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_combined_file_that_is_none(tmp_path: Path, text: str) -> None:
    put(tmp_path, COMBINED, text)
    with pytest.raises(
        LocalError, match=r"combined-cloud-config\.json is not what cloud-init writes"
    ):
        find(tmp_path)


def test_merged_file_counts_only_while_cloud_init_is_enabled(tmp_path: Path) -> None:
    inner = "".join(f"  {line}\n" for line in BASE.splitlines())
    put(tmp_path, MERGED, f"#cloud-config\n\nusers: [&a x, *a]\nfirstboot:\n{inner}  masters: 2\n")
    assert find(tmp_path) is None
    put(tmp_path, "run/cloud-init/enabled", "")
    assert refused(tmp_path) == (
        "/var/lib/cloud/instance/cloud-config.txt:8:12: masters must be 1, 3 or 5, not 2; "
        "for example: masters: 3"
    )


def test_vendors_are_read_below_the_operator_without_a_combined_file(tmp_path: Path) -> None:
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, MERGED, "#cloud-config\nfirstboot: {expect: 2}\n")
    put(tmp_path, VENDORS[0], f"firstboot: {json.dumps({**SAID, 'formation': 'a'})}\n")
    put(tmp_path, VENDORS[1], "firstboot: {formation: b}\n")
    document = found(tmp_path)
    assert (document.config.expect, document.formation_id) == (2, "demo/b")
    assert len(document.sources) == 3
    put(tmp_path, COMBINED, "{}")  # a newer cloud-init has put all of it together
    assert find(tmp_path) is None


def test_raw_user_data_is_never_read(tmp_path: Path) -> None:
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, "var/lib/cloud/instance/user-data.txt", "#cloud-config\nfirstboot: {a: b}\n")
    put(tmp_path, MERGED, "#cloud-config\n{}\n")
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "cloud-init is absent and there is no /etc/firstboot/config.yaml"),
        (
            {"run/cloud-init/disabled": ""},
            "cloud-init is disabled and there is no /etc/firstboot/config.yaml",
        ),
        (
            {"run/cloud-init/enabled": ""},
            "cloud-init is enabled but has not stored any user-data; see cloud-init status --long",
        ),
        (
            {
                "run/cloud-init/enabled": "",
                "var/lib/cloud/instance/user-data.txt": "#cloud-confg\na: b\n",
                MERGED: "#cloud-config\n# from 1 files\n",
            },
            "cloud-init ran but found no cloud-config in the user-data; "
            "its first line must be #cloud-config and the rest valid YAML",
        ),
        (
            {
                "run/cloud-init/enabled": "",
                "var/lib/cloud/instance/user-data.txt": "#cloud-config\nusers: []\n",
                MERGED: "#cloud-config\nusers: []\n",
                COMBINED: '{"users": []}',
            },
            "cloud-init ran but its user-data neither writes /etc/firstboot/config.yaml "
            "nor has a firstboot key",
        ),
        (
            {"run/cloud-init/enabled": "", COMBINED: "{}"},
            "cloud-init ran but its user-data neither writes /etc/firstboot/config.yaml "
            "nor has a firstboot key",
        ),
    ],
    ids=["absent", "disabled", "not-yet", "unusable", "no-key", "no-user-data"],
)
def test_why_not_configured(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        put(tmp_path, name, text)
    assert find(tmp_path) is None
    assert explain(tmp_path) == f"not configured: {reason}"


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([f"('write_files', OSError('{TOKEN}'))"], "; in cloud-init write_files failed, see "),
        ([f"bad: {TOKEN}"], "; in cloud-init something failed, see cloud-init status --long"),
        (["('a', 1)", "('b', 2)", "('a', 3)"], "; in cloud-init a, b failed, see "),
    ],
)
def test_what_failed_in_cloud_init_is_named_and_not_quoted(
    tmp_path: Path, errors: list[str], told: str
) -> None:
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, COMBINED, "{}")
    stages: dict[str, Any] = {
        "init": {"errors": errors},
        "stage": None,
        "modules-config": {"errors": []},
    }
    put(tmp_path, STAGES, json.dumps({"v1": stages}))
    text = explain(tmp_path)
    assert text.startswith("not configured: cloud-init ran and there is no /etc/firstboot/")
    assert told in text
    assert TOKEN not in text


@pytest.mark.parametrize("text", ["", "[", "[]", '{"v1": 5}', '{"v1": {"a": {"errors": 5}}}'])
def test_a_strange_list_of_stages_is_no_reason(tmp_path: Path, text: str) -> None:
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, COMBINED, "{}")
    put(tmp_path, STAGES, text)
    assert explain(tmp_path).endswith("nor has a firstboot key")
