"""Takes the token off this host's disk once it opens nothing, and tells where it still is.

Done at CLOSE, and at every later boot, because cloud-init writes its copies anew. Files in
documented places are looked through, see `userdata/traces.py`; what lies beyond a host's reach,
such as a metadata service, is told with the remedy for that platform.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from firstboot import host, userdata
from firstboot.protocol.errors import FirstbootError
from firstboot.userdata import traces

EC2 = (
    "Require IMDSv2 with a hop limit of 1 (modify-instance-metadata-options --http-tokens required"
    " --http-put-response-hop-limit 1), so that no container asks; or switch that endpoint off, or"
    " stop the instance and empty its user-data."
)
REMEDIES = {
    "ec2": EC2,
    "aws": EC2,
    "openstack": "User-data cannot be taken back from a running server: deny 169.254.169.254 to"
    " everybody but root, and to containers, with nftables.",
    "gce": "Remove it: gcloud compute instances remove-metadata --keys user-data.",
    "gcp": "Remove it: gcloud compute instances remove-metadata --keys user-data.",
    "azure": "Empty it: az vm update --user-data ''.",
}
OTHER = "Deny its address to everybody but root, and to containers, with nftables."
DISK = "Detach it, or take the token out of the user-data on it."
IN_IMAGE = "Every host of this image has it: take it out of the image, give it by user-data."
MAX_TOLD = 10
Exposed = list[dict[str, str]]


def scrub(root: Path) -> Exposed:
    """Take the token out of every copy; where it still is, each with a remedy. Never raises.

    May be repeated at any moment: a file is as it was, or without the token.
    """
    left: Exposed = []
    _clean_all(traces.documents(root), root, left)
    by_cloud_init = _clean_all(traces.copies(root, traces.CLOUD_INIT), root, left)
    by_ignition = _clean_all(traces.copies(root, traces.IGNITION), root, left)
    for path in traces.copies(root, traces.IMAGE):
        data = _read(path)
        if data is not None and traces.without_token(data)[0] != data:
            left.append(_told(f"/{path.relative_to(root)}", IN_IMAGE))
    left += _named(root)
    if by_cloud_init:
        left += _source(root)
    elif by_ignition or _booted_by_ignition(root):
        left += _ignition_source(root)
    return left[:MAX_TOLD]


def _clean_all(paths: Iterable[Path], root: Path, left: Exposed) -> bool:
    """Whether the token was, or had been, in any of these files; `left` gets those it stays in."""
    found = False
    for path in paths:
        data = _read(path)
        if data is None:
            continue
        cleaned, there = traces.without_token(data)
        found = found or there
        if cleaned != data:
            try:
                _write(path, cleaned)
            except (OSError, FirstbootError):
                name = path.relative_to(root) if path.is_relative_to(root) else path
                left.append(_told(f"/{name}", "It cannot be written: remove the token from it."))
    return found


def _read(path: Path) -> bytes | None:
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            data = file.read(traces.MAX_FILE + 1)
    except OSError:
        return None
    return data if len(data) <= traces.MAX_FILE else None


def _write(path: Path, data: bytes) -> None:
    before = path.stat()
    host.write_durably(path, data, before.st_mode & 0o7777)
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(path, before.st_uid, before.st_gid)


def _told(where: str, remedy: str) -> dict[str, str]:
    return {"where": where, "remedy": remedy}


# ---------------------------------------------------------------- where it came from


def _source(root: Path) -> Exposed:
    """Where cloud-init got the user-data (instance-data.json, keys below v1)."""
    try:
        data = json.loads(_read(root / "run/cloud-init/instance-data.json") or b"")
        known: dict[str, Any] = data["v1"]
        platform, below = str(known.get("platform")), str(known.get("subplatform"))
        cloud = str(known.get("cloud_name"))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []
    kind, _, place = below.partition(" (")
    place = place.rstrip(")")[:200]
    if kind == "seed-dir":
        return []  # a directory of this host, looked through if it is cloud-init's own
    if place.startswith("/dev/"):
        return [_told(f"the disk {place}", DISK)]
    remedy = REMEDIES.get(cloud) or REMEDIES.get(platform) or OTHER
    at = f", {place}" if place else ""
    return [_told(f"the metadata service ({cloud}{at})", remedy)]


def _named(root: Path) -> Exposed:
    """What the kernel's command line names was fetched, and is for others to fetch as well."""
    try:
        source = userdata.named(root)
    except FirstbootError:
        return []
    return (
        [_told(str(source), "Take it out of that document when all hosts are in.")]
        if source
        else []
    )


def _booted_by_ignition(root: Path) -> bool:
    config = root / userdata.CONFIG
    return bool(_ignition_platform(root)) and config.exists()


def _ignition_source(root: Path) -> Exposed:
    platform = _ignition_platform(root) or "ignition"
    if platform in ("metal", "qemu", "file"):
        return []
    remedy = REMEDIES.get(platform, OTHER)
    return [_told(f"the metadata service ({platform})", remedy)]


def _ignition_platform(root: Path) -> str:
    """What the kernel was told (Ignition's documentation, "Supported platforms")."""
    words = (_read(root / "proc/cmdline") or b"").decode(errors="replace").split()
    named = [w.partition("=")[2] for w in words if w.startswith("ignition.platform.id=")]
    return named[-1][:40] if named else ""
