"""One attempt to get the document that the kernel's command line names, in bounds."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from http import HTTPStatus
from pathlib import Path

from firstboot.protocol.errors import LocalError
from firstboot.userdata.kernel import DIGEST, Source
from firstboot.userdata.reading import MAX_BYTES
from firstboot.web import ask

PATIENCE = 30.0  # seconds for one attempt, however slowly the other side sends
# Mounted where nobody else sees it, and gone with this process. A link that leads out of the device
# is not followed: the file with its links resolved must still be below the mount point.
_READ = """
mount -o ro,nosuid,nodev,noexec -- "$1" "$2"
file=$(realpath -e -- "$2$3") || exit
case $file in "$2"/*) ;; *) echo "$3 leads out of the device" >&2; exit 1 ;; esac
[ -f "$file" ] || { echo "$3 is not a regular file" >&2; exit 1; }
head -c "$4" -- "$file"
"""


def fetch(source: Source, directory: Path) -> bytes:
    """The document's bytes; LocalError if they cannot be had now, or are not those of the digest.

    A device is mounted below `directory`, for this call alone. No redirect is followed and no
    proxy asked: what was checked about the address holds for no other one.
    """
    data = _from_device(source, directory) if source.path else _from_url(source.place)
    found = hashlib.sha256(data).hexdigest()
    if source.digest and found != source.digest:
        raise LocalError(f"its SHA-256 is {found}, which is not what {DIGEST} says")
    return data


def _from_url(place: str) -> bytes:
    answer = ask("GET", place, {}, seconds=PATIENCE, most=MAX_BYTES)
    if answer.status != HTTPStatus.OK:
        raise LocalError(_plain(f"the server answers {answer.status} {answer.reason}"))
    return answer.body


def _from_device(source: Source, directory: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".device-") as mount:
        script = ["unshare", "--mount", "--propagation=private", "sh", "-euc", _READ, "read"]
        what = [source.place, mount, source.path, str(MAX_BYTES + 1)]
        try:
            done = subprocess.run([*script, *what], capture_output=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise LocalError(f"the device gives nothing within {PATIENCE:g} s") from None
        except OSError as error:
            raise LocalError(f"it cannot be mounted: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").replace(mount, "").strip().splitlines()
        raise LocalError(_plain(said[0] if said else "it cannot be read"))
    if len(done.stdout) > MAX_BYTES:
        raise LocalError("it is larger than 1 MB")
    return done.stdout


def _plain(text: str) -> str:
    """What somebody else wrote, as a part of a sentence of ours."""
    return "".join(c for c in text[:200] if c.isprintable()).strip() or "it cannot be had"
