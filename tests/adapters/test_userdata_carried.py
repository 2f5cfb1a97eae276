"""A document inside a cloud-config, an Ignition or a Butane configuration."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import pytest

from firstboot.protocol.errors import UserError
from firstboot.userdata import parse
from firstboot.userdata.token import assemble

TOKEN = assemble("7q0hzk3n5x9wbfcyd2rt8gjm4v6sape1")
BASE = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"


def cloud(*entries: dict[str, Any], **keys: Any) -> bytes:
    return b"#cloud-config\n" + json.dumps({"write_files": entries, **keys}).encode()


def entry(content: str, path: str = "/etc/firstboot/config.yaml", **keys: Any) -> dict[str, Any]:
    return {"path": path, "permissions": "0600", "content": content, **keys}


def test_cloud_config_with_write_files() -> None:
    other = entry("x: [", "/etc/other")
    assert parse(cloud(other, entry(BASE)), "u").config.cluster == "demo"


def test_cloud_config_positions_are_of_the_inner_document() -> None:
    with pytest.raises(UserError) as caught:
        parse(cloud(entry(BASE + "masters: 2\n")), "u.yaml")
    assert str(caught.value) == (
        "u.yaml, /etc/firstboot/config.yaml in it:4:10: masters must be 1, 3 or 5, not 2; "
        "for example: masters: 3"
    )


def test_cloud_config_key_has_positions_of_the_file() -> None:
    inner = "".join(f"  {line}\n" for line in BASE.splitlines())
    with pytest.raises(UserError) as caught:
        parse(f"#cloud-config\nfirstboot:\n{inner}  masters: 2\n".encode(), "u.yaml")
    assert caught.value.where == "u.yaml:6:12"


def test_cloud_config_files_merge_as_on_a_host() -> None:
    drop_in = "/etc/firstboot/config.d/10.yaml"
    late = entry("network: {port: 3}", "/run/firstboot/config.d/00.yaml")
    files = [late, entry("network: {port: 2}", drop_in), entry(BASE + "network: {port: 1}")]
    document = parse(cloud(*files, firstboot={"formation": "x", "network": {"port": 9}}), "u")
    assert (document.port, document.formation_id) == (3, "demo/x")


@pytest.mark.parametrize(
    "encoding", ["b64", "base64", "gz", "gzip", "gz+b64", "gzip+base64", "text/plain"]
)
def test_cloud_config_encodings(encoding: str) -> None:
    data = BASE.encode()
    data = gzip.compress(data) if "gz" in encoding else data
    if "64" in encoding or "gz" in encoding:
        if "64" not in encoding:  # raw gzip bytes come as a YAML binary
            text = base64.b64encode(data).decode()
            document = (
                "#cloud-config\nwrite_files:\n- path: /etc/firstboot/config.yaml\n"
                f"  permissions: '0600'\n  encoding: {encoding}\n  content: !!binary {text}\n"
            )
            assert parse(document.encode(), "u").config.cluster == "demo"
            return
        data = base64.b64encode(data)
    assert parse(cloud(entry(data.decode(), encoding=encoding)), "u").config.cluster == "demo"


@pytest.mark.parametrize(
    "broken",
    [
        entry("x", encoding="gz+b64"),
        entry(base64.b64encode(gzip.compress(BASE.encode())[:-12]).decode(), encoding="gz+b64"),
        {"path": "/etc/firstboot/config.yaml", "source": {"uri": "https://example.org/"}},
    ],
    ids=["not-base64", "cut-off", "elsewhere"],
)
def test_cloud_config_contents_that_are_not_there(broken: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        parse(cloud(broken), "u.yaml")
    assert str(caught.value) == (
        "u.yaml, /etc/firstboot/config.yaml in it: "
        "the contents are not in this file or cannot be decoded"
    )


def test_decompression_bomb_is_refused() -> None:
    bomb = base64.b64encode(gzip.compress(b"#" * 50_000_000)).decode()
    with pytest.raises(UserError, match="larger than 1 MB"):
        parse(cloud(entry(bomb, encoding="gz+b64")), "u.yaml")


def test_cloud_config_warnings() -> None:
    plain = {"path": "/etc/firstboot/config.yaml", "content": BASE, "defer": True}
    inner = "u, /etc/firstboot/config.yaml in it"
    assert parse(cloud(plain), "u").warnings == (
        f"{inner} will be readable by others: give it the mode 0600",
        f"{inner} will be written after firstboot looks: remove defer",
    )


NOTHING = "this holds no firstboot configuration; have it write /etc/firstboot/config.yaml"


@pytest.mark.parametrize(
    "data",
    [
        b"#cloud-config\nusers: []\n",
        b"#cloud-config\n",
        b"#cloud-config\nfirstboot:\n",
        b"write_files: 5\n",
        b"write_files: [5, {path: [a]}]\n",
        b"write_files: [{path: /etc/firstboot/config.d/x.yml, content: a}]\n",
        b'{"ignition": {"version": "3.4.0"}}',
        b'{"ignition": 1, "storage": {"files": [1, {"path": 5}, {"contents": []}]}}',
        b"variant: fcos\nstorage: {files: [{path: /etc/x}]}\n",
    ],
)
def test_carrier_without_the_document(data: bytes) -> None:
    with pytest.raises(UserError) as caught:
        parse(data, "u")
    assert str(caught.value) == f"u: {NOTHING}"


def ignition(source: str, **contents: Any) -> bytes:
    file = {"path": "/etc/firstboot/config.yaml", "contents": {"source": source, **contents}}
    return json.dumps({"ignition": {}, "storage": {"files": [{**file, "mode": 0o600}]}}).encode()


@pytest.mark.parametrize("media", ["", "text/plain;charset=utf-8"])
def test_ignition_with_compressed_contents(media: str) -> None:
    packed = base64.b64encode(gzip.compress(BASE.encode())).decode()
    data = ignition(f"data:{media};base64,{packed}", compression="gzip")
    document = parse(data, "u.ign")
    assert document.config.cluster == "demo"
    assert document.warnings == ()


def test_ignition_mistake_has_the_inner_position() -> None:
    with pytest.raises(UserError) as caught:
        parse(ignition("data:,cluster%3A%20demo%0Aexpcet%3A%203%0A"), "u.ign")
    assert str(caught.value) == (
        "u.ign, /etc/firstboot/config.yaml in it:2:1: unknown key 'expcet'; did you mean expect?"
    )


@pytest.mark.parametrize("source", ["https://example.org/x", "data:nocomma", "data:;base64,x"])
def test_ignition_contents_that_are_not_there(source: str) -> None:
    with pytest.raises(UserError, match="the contents are not in this file or cannot be decoded"):
        parse(ignition(source), "u.ign")


def test_ignition_default_mode_is_warned_about() -> None:
    data = ignition("data:;base64," + base64.b64encode(BASE.encode()).decode())
    warned = json.loads(data)
    del warned["storage"]["files"][0]["mode"]
    assert parse(data, "u").warnings == ()
    assert len(parse(json.dumps(warned).encode(), "u").warnings) == 1
