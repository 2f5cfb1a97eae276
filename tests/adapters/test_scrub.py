"""The token off the disk: every form its copies have, and what is told of those out of reach."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import random
import stat
import zlib
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from urllib.parse import quote

import pytest

from firstboot import host, scrub, userdata
from firstboot.protocol.errors import UserError
from firstboot.userdata import traces

TOKEN = userdata.make_token()
DOCUMENT = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"
CLOUD_CONFIG = f"#cloud-config\nfirstboot:\n  cluster: demo\n  token: '{TOKEN}'\n  expect: 3\n"
SPOKEN = "fb1-removed-when-admission-closed"


def mime() -> bytes:
    """What cloud-localds and the like make; text that is no ASCII goes as base64."""
    whole = MIMEMultipart()
    whole.attach(MIMEText("#!/bin/sh\n", "x-shellscript"))
    whole.attach(MIMEText(CLOUD_CONFIG + "# \N{LATIN SMALL LETTER E WITH ACUTE}\n", "cloud-config"))
    return whole.as_bytes()


def encoded(text: str = DOCUMENT) -> str:
    return base64.b64encode(text.encode()).decode()


FORMS = {
    "document": DOCUMENT.encode(),
    "quoted": f'token: "{TOKEN}"\n'.encode(),
    "one-time": DOCUMENT.replace(TOKEN, userdata.make_token("fb1j")).encode(),
    "json": json.dumps({"userdata": CLOUD_CONFIG}).encode(),
    "pickle": pickle.dumps({"userdata_raw": CLOUD_CONFIG, "x": 1}),
    "pickled bytes": pickle.dumps({"userdata_raw": CLOUD_CONFIG.encode()}),
    "gzip": gzip.compress(CLOUD_CONFIG.encode()),
    "pickled gzip": pickle.dumps({"userdata_raw": gzip.compress(CLOUD_CONFIG.encode()), "x": 1}),
    "mime": mime(),
    "mime in json": json.dumps({"userdata": mime().decode()}).encode(),
    "write_files b64": f"write_files:\n- encoding: b64\n  content: {encoded()}\n".encode(),
    "pickled b64": pickle.dumps({"content": encoded()}),
    "gz+b64": b"  content: " + base64.b64encode(gzip.compress(DOCUMENT.encode())) + b"\n",
    "ignition": json.dumps({"source": f"data:,{quote(DOCUMENT)}"}).encode(),
    "ignition b64": json.dumps({"source": f"data:;base64,{encoded()}"}).encode(),
    "mime gzip": gzip.compress(mime()),
}


def holds(data: bytes, depth: int = 4) -> bool:
    """Whether a token is in there, looked for by other means than the product's."""
    if b"fb1-" + TOKEN.encode()[4:] in data or (b"fb1j-" in data and SPOKEN.encode() not in data):
        return True
    for at in range(len(data)):
        if data[at : at + 2] == b"\x1f\x8b":
            try:
                if holds(zlib.decompressobj(31).decompress(data[at:]), depth - 1):
                    return True
            except zlib.error:
                pass
    text = data.replace(b"\\n", b"").replace(b"\n", b"")
    # Any three bytes of the token, as base64 writes them at one of three offsets.
    middle = TOKEN[8:35].encode()
    return any(base64.b64encode(b"\0" * pad + middle)[4:-4] in text for pad in range(3)) or (
        depth == 4 and any(holds(part, 0) for part in _gzips(text))
    )


def _gzips(text: bytes) -> list[bytes]:
    found = []
    for at in range(len(text) - 4):
        if text[at : at + 4] == b"H4sI":  # how base64 writes gzip's first bytes
            end = at
            while end < len(text) and (text[end : end + 1].isalnum() or text[end] in b"+/="):
                end += 1
            found.append(gzip.decompress(base64.b64decode(text[at:end])))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_any_form_loses_the_token_and_keeps_its_length(form: str) -> None:
    data = FORMS[form]
    assert holds(data), "this test could not fail"
    cleaned, found = traces.without_token(data)
    assert found
    assert len(cleaned) == len(data)
    assert not holds(cleaned)
    again, found = traces.without_token(cleaned)
    assert (again, found) == (cleaned, True)  # it is still known that there was one


def test_what_reads_a_copy_can_still_read_it() -> None:
    def cleaned(form: str) -> bytes:
        return traces.without_token(FORMS[form])[0]

    for form in ("pickle", "pickled bytes", "pickled gzip", "pickled b64"):
        was, now = pickle.loads(FORMS[form]), pickle.loads(cleaned(form))
        assert was.keys() == now.keys()
    json.loads(cleaned("mime in json"))
    content = cleaned("write_files b64").split(b"content: ")[1]
    assert (
        base64.b64decode(content) == DOCUMENT.replace(TOKEN, SPOKEN.ljust(len(TOKEN), "-")).encode()
    )
    document = userdata.parse(cleaned("document"), "x")
    assert document.config == userdata.parse(DOCUMENT.encode(), "x").config


def test_what_holds_no_token_is_left_as_it_is() -> None:
    rng = random.Random(1)
    for data in (
        b"",
        b"token: fb1-short\n",
        rng.randbytes(200_000),
        b"A" * 200_000,
        base64.encodebytes(rng.randbytes(100_000)),
        gzip.compress(b"x" * 100_000),
        b"\x1f\x8b\x08" * 5_000,
        (b"A" * 76 + b"\n") * 3_000,
    ):
        assert traces.without_token(data) == (data, False)


# ---------------------------------------------------------------- a host


def put(root: Path, name: str, data: bytes | str, mode: int = 0o600) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)
    return path


def cloud(root: Path, platform: str, subplatform: str) -> None:
    v1 = {"v1": {"platform": platform, "cloud_name": platform, "subplatform": subplatform}}
    put(root, "run/cloud-init/instance-data.json", json.dumps(v1), 0o644)


def with_token(root: Path) -> list[str]:
    files = (p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    return sorted(str(p.relative_to(root)) for p in files if TOKEN.encode() in p.read_bytes())


def test_the_document_stays_useful_without_its_token(tmp_path: Path) -> None:
    config = put(tmp_path, "etc/firstboot/config.yaml", f"# mine\n{DOCUMENT}payload: none\n")
    put(tmp_path, "run/firstboot/config.d/10-x.yaml", f"token: {TOKEN}\n")
    assert scrub.scrub(tmp_path) == []
    assert with_token(tmp_path) == []
    assert config.read_text().startswith("# mine\ncluster: demo\ntoken: fb1-removed")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    document = userdata.find(tmp_path)
    assert document is not None
    assert document.config.expect == 3
    assert not document.token.reveal()
    assert not document.late
    with pytest.raises(UserError, match="removed when admission closed"):
        document.require_token()
    before = config.stat()
    assert scrub.scrub(tmp_path) == []
    assert config.stat() == before  # nothing is written when there is nothing to do


def test_a_link_to_the_document_is_followed_and_stays(tmp_path: Path) -> None:
    real = put(tmp_path, "srv/firstboot.yaml", DOCUMENT)
    link = tmp_path / "etc/firstboot/config.yaml"
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    assert scrub.scrub(tmp_path) == []
    assert with_token(tmp_path) == []
    assert link.is_symlink()


def test_cloud_init_s_copies_go_and_the_service_is_told(tmp_path: Path) -> None:
    for name in (
        "var/lib/cloud/instances/i-1/user-data.txt",
        "var/lib/cloud/instances/i-1/obj.pkl",
        "var/lib/cloud/instances/i-1/scripts/runcmd",
        "run/cloud-init/instance-data-sensitive.json",
        "run/cloud-init/combined-cloud-config.json",
    ):
        put(tmp_path, name, DOCUMENT, 0o640)
    (tmp_path / "var/lib/cloud/instance").symlink_to("instances/i-1")
    cloud(tmp_path, "ec2", "metadata (http://169.254.169.254)")
    told = scrub.scrub(tmp_path)
    assert with_token(tmp_path) == []
    assert [t["where"] for t in told] == ["the metadata service (ec2, http://169.254.169.254)"]
    assert "hop limit of 1" in told[0]["remedy"]
    assert scrub.scrub(tmp_path) == told  # also when there is no copy any more
    path = tmp_path / "var/lib/cloud/instances/i-1/user-data.txt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("platform", "subplatform", "where", "remedy"),
    [
        ("openstack", "metadata (http://169.254.169.254)", "metadata service", "nftables"),
        ("openstack", "config-disk (/dev/sr0)", "the disk /dev/sr0", "Detach"),
        ("nocloud", "config-disk (/dev/vdb)", "the disk /dev/vdb", "Detach"),
        (
            "gce",
            "metadata (http://metadata.google.internal)",
            "metadata service",
            "remove-metadata",
        ),
        ("elsewhere", "metadata (http://192.0.2.1)", "metadata service", "Deny its address"),
    ],
)
def test_each_platform_has_its_remedy(
    tmp_path: Path, platform: str, subplatform: str, where: str, remedy: str
) -> None:
    put(tmp_path, "var/lib/cloud/instances/i-1/user-data.txt", CLOUD_CONFIG)
    cloud(tmp_path, platform, subplatform)
    (told,) = scrub.scrub(tmp_path)
    assert where in told["where"]
    assert remedy in told["remedy"]


def test_user_data_without_a_token_says_nothing_of_the_service(tmp_path: Path) -> None:
    put(tmp_path, "etc/firstboot/config.yaml", DOCUMENT)
    put(tmp_path, "var/lib/cloud/instances/i-1/user-data.txt", "#cloud-config\npackages: [x]\n")
    cloud(tmp_path, "ec2", "metadata (http://169.254.169.254)")
    assert scrub.scrub(tmp_path) == []


def test_what_the_kernel_s_command_line_names_is_told(tmp_path: Path) -> None:
    put(tmp_path, "proc/cmdline", "quiet firstboot.config=https://boot.example.org/a?secret=1\n")
    put(tmp_path, "run/firstboot/config.d/50-kernel-argument.yaml", DOCUMENT)
    (told,) = scrub.scrub(tmp_path)
    assert told["where"] == "https://boot.example.org/a"
    assert with_token(tmp_path) == []


def test_ignition_s_leftovers_go_and_its_platform_is_told(tmp_path: Path) -> None:
    put(tmp_path, "etc/firstboot/config.yaml", DOCUMENT)
    put(tmp_path, "run/ignition.json", FORMS["ignition b64"])
    put(tmp_path, "proc/cmdline", "quiet ignition.platform.id=aws\n")
    (told,) = scrub.scrub(tmp_path)
    assert "hop limit" in told["remedy"]
    assert not holds((tmp_path / "run/ignition.json").read_bytes())
    put(tmp_path, "proc/cmdline", "quiet ignition.platform.id=metal\n")
    assert scrub.scrub(tmp_path) == []


def test_the_image_s_own_documents_are_told_and_never_changed(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/firstboot/config.d/10-image.yaml", DOCUMENT)
    (told,) = scrub.scrub(tmp_path)
    assert told["where"] == "/usr/lib/firstboot/config.d/10-image.yaml"
    assert "Every host of this image" in told["remedy"]
    assert with_token(tmp_path) == ["usr/lib/firstboot/config.d/10-image.yaml"]


def test_a_file_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "var/lib/cloud/seed/nocloud/user-data", CLOUD_CONFIG)
    put(tmp_path, "etc/firstboot/config.yaml", DOCUMENT)
    real = host.write_durably

    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        if "seed" in path.parts:
            raise host.StorageFailed("cannot write: the file system is read-only")
        real(path, data, mode)

    monkeypatch.setattr(host, "write_durably", write)
    (told,) = scrub.scrub(tmp_path)
    assert told["where"] == "/var/lib/cloud/seed/nocloud/user-data"
    assert with_token(tmp_path) == ["var/lib/cloud/seed/nocloud/user-data"]


def test_odd_files_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "var/lib/cloud"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(".")
    (folder / "away").symlink_to("/etc/passwd")
    (folder / "big").write_bytes(b"\0" * (traces.MAX_FILE + 1))
    assert scrub.scrub(tmp_path) == []
