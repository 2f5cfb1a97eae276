"""Where a host's configuration may lie, and why a host has none."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from firstboot.protocol.errors import LocalError, UserError
from firstboot.userdata.document import Document, make
from firstboot.userdata.reading import MAX_BYTES, Said, children, compose, read, said_by, text_of

DEFAULTS = "usr/lib/firstboot/config.d"
CONFIG = "etc/firstboot/config.yaml"
DROP_INS = ("etc/firstboot/config.d", "run/firstboot/config.d")
JOIN = f"{DROP_INS[0]}/90-join.yaml"  # the one-time token, from `firstboot join` until it joined
ENABLED, DISABLED = "run/cloud-init/enabled", "run/cloud-init/disabled"  # its generator's markers
COMBINED = "run/cloud-init/combined-cloud-config.json"  # cloud-init 23.3 and newer
# Before that a file for each origin; vendors' data, which the operator's wins over, comes first.
INSTANCE = "var/lib/cloud/instance"
MERGED = f"{INSTANCE}/cloud-config.txt"
VENDORS = (f"{INSTANCE}/vendor-cloud-config.txt", f"{INSTANCE}/vendor2-cloud-config.txt")
STAGES = "run/cloud-init/status.json"
RAW = f"{INSTANCE}/user-data.txt"


def find(root: Path) -> Document | None:
    """This host's configuration, or None where nobody configured it (see `explain`).

    Lowest precedence first: image defaults, cloud-init's merged result, config.yaml, drop-ins in
    /etc, drop-ins in /run. Image defaults alone configure nothing. Raises UserError for a
    mistake, LocalError for a file that cannot be read.
    """
    drop_ins = [path for folder in DROP_INS for path in _yaml_files(root, folder)]
    said = [*_cloud_init(root), *(_load(root, name) for name in (CONFIG, *drop_ins))]
    if not any(layer for _, layer in said):
        return None
    defaults = [_load(root, name) for name in _yaml_files(root, DEFAULTS)]
    given = [(name, layer) for name, layer in (*defaults, *said) if layer]
    warnings = [
        f"{name} holds the token and others can read it: chmod 0600 {name}"
        for name, layer in given
        if "token" in layer.data and _mode(root, name[1:]) & 0o044
    ]
    return make([layer for _, layer in given], [name for name, _ in given], warnings)


def explain(root: Path) -> str:
    """One sentence: why this host is not configured. For when `find` gave None."""
    if not _mode(root, ENABLED):
        state = "disabled" if _mode(root, DISABLED) else "absent"
        return f"not configured: cloud-init is {state} and there is no /{CONFIG}"
    trouble = _trouble(root)
    look = "; see cloud-init status --long"
    if not _mode(root, COMBINED) and not _mode(root, MERGED):
        reason = "is enabled but has not stored any user-data"
        return f"not configured: cloud-init {reason}{trouble or look}"
    raw = read_file(root / RAW, f"/{RAW}")
    if raw and not _says_something(read_file(root / MERGED, f"/{MERGED}") or b""):
        return (
            "not configured: cloud-init ran but found no cloud-config in the user-data; "
            f"its first line must be #cloud-config and the rest valid YAML{trouble}"
        )
    if trouble:
        return f"not configured: cloud-init ran and there is no /{CONFIG}{trouble}"
    return (
        f"not configured: cloud-init ran but its user-data neither writes /{CONFIG} "
        "nor has a firstboot key"
    )


def _trouble(root: Path) -> str:
    """What failed in cloud-init, as the end of a sentence; empty if nothing did.

    Names only: what it says of an error may quote the user-data, and so the token.
    """
    try:
        stages = json.loads(read_file(root / STAGES, f"/{STAGES}") or b"{}")["v1"].values()
        errors = [e for s in stages if isinstance(s, dict) for e in s.get("errors", ())]
    except (LocalError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return ""
    modules = [m[1] for e in errors if (m := re.match(r"\('([a-z0-9_-]{1,40})'", str(e)))]
    failed = f"{', '.join(dict.fromkeys(modules))} failed" if modules else "something failed"
    return f"; in cloud-init {failed}, see cloud-init status --long" if errors else ""


def written(root: Path) -> list[Path]:
    """The files of a document that user-data put on this host: not the image's defaults."""
    names = [CONFIG, *(name for folder in DROP_INS for name in _yaml_files(root, folder))]
    return [root / name for name in names if os.path.lexists(root / name)]


def read_file(path: Path, name: str) -> bytes | None:
    """A regular file's first `MAX_BYTES` + 1 bytes; None where there is none.

    UserError for a FIFO, a device and the like; LocalError where reading fails.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not hang the boot.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise UserError("this is not a regular file", where=name)
            return file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LocalError(f"cannot read {name}: {error.strerror}") from None


def _cloud_init(root: Path) -> list[tuple[str, Said | None]]:
    """The `firstboot` key of cloud-init's merged result, if cloud-init ran in this boot.

    The combined file lies in /run, so it is of this boot. The others may be left over from an
    earlier boot, or from the machine an image was made of, so they count only while cloud-init is
    enabled. Raw user-data is never read: it may be compressed, MIME, a template or an include.
    """
    name, data = f"/{COMBINED}", read_file(root / COMBINED, f"/{COMBINED}")
    if data is not None:
        try:
            key = json.loads(text_of(data, name))["firstboot"]
        except KeyError:
            return []
        except (ValueError, TypeError, RecursionError):
            raise LocalError(f"{name} is not what cloud-init writes") from None
        # JSON is YAML too, so one reader checks both; positions in this file would help nobody.
        flow = json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass")
        inner = f"{name}, key firstboot"
        return [(name, read(text_of(flow, inner), inner, positions=False))]
    if not _mode(root, ENABLED):
        return []
    return [_key_in(root, name) for name in (*VENDORS, MERGED)]


def _key_in(root: Path, name: str) -> tuple[str, Said | None]:
    shown, data = f"/{name}", read_file(root / name, f"/{name}")
    whole = None if data is None else compose(text_of(data, shown), shown)
    return shown, said_by(children(whole).get("firstboot"), shown)


def settings(root: Path, path: str) -> Any:
    """Another program's YAML file on this host, as plain data; None where there is none.

    `path` is absolute on the host. UserError for a mistake in it, LocalError for what cannot be
    read; neither quotes it.
    """
    _, said = _load(root, path.lstrip("/"))
    return None if said is None else said.data


def _says_something(merged: bytes) -> bool:
    try:
        return bool(children(compose(text_of(merged, ""), "")))
    except UserError:
        return False


def _yaml_files(root: Path, folder: str) -> list[str]:
    try:
        names = sorted(path.name for path in (root / folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LocalError(f"cannot read /{folder}: {error.strerror}") from None
    return [f"{folder}/{n}" for n in names if n.endswith(".yaml") and not n.startswith(".")]


def _load(root: Path, name: str) -> tuple[str, Said | None]:
    shown, data = f"/{name}", read_file(root / name, f"/{name}")
    return shown, None if data is None else read(text_of(data, shown), shown)


def _mode(root: Path, name: str) -> int:
    """The file's mode, 0 where there is none."""
    try:
        return (root / name).stat().st_mode
    except OSError:
        return 0
