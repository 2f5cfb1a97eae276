"""One attempt to get the document that the kernel's command line names, in bounds."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from firstboot.protocol.errors import LocalError
from firstboot.userdata.kernel import DIGEST, Source
from firstboot.userdata.reading import MAX_BYTES

PATIENCE = 30.0  # seconds for one attempt, however slowly the other side sends
SILENCE = 10.0  # seconds without a byte
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
    if len(data) > MAX_BYTES:
        raise LocalError("it is larger than 1 MB")
    found = hashlib.sha256(data).hexdigest()
    if source.digest and found != source.digest:
        raise LocalError(f"its SHA-256 is {found}, which is not what {DIGEST} says")
    return data


# ---------------------------------------------------------------- a URL


def _from_url(place: str) -> bytes:
    late = threading.Event()
    try:
        return _get(place, late)
    except ssl.SSLCertVerificationError as error:
        reason = f"the server's certificate is not trusted: {error.verify_message}"
    except TimeoutError:
        reason = "the server does not answer"
    except OSError as error:
        reason = error.strerror or str(error)
    except http.client.HTTPException as error:
        reason = f"the server's answer is not HTTP, or not whole ({type(error).__name__})"
    raise LocalError(f"it did not come within {PATIENCE:g} s" if late.is_set() else _plain(reason))


def _get(place: str, late: threading.Event) -> bytes:
    url = urlsplit(place)
    where = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    with socket.create_connection(where, timeout=SILENCE) as connection, connection.dup() as wire:

        def cut() -> None:
            late.set()
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

        # A byte now and then would otherwise hold this up for ever, in the handshake as well.
        timer = threading.Timer(PATIENCE, cut)
        timer.daemon = True
        timer.start()
        try:
            if url.scheme == "http":
                return _ask(connection, url)
            context = ssl.create_default_context()
            with context.wrap_socket(connection, server_hostname=where[0]) as secured:
                return _ask(secured, url)
        finally:
            timer.cancel()


def _ask(connection: socket.socket, url: SplitResult) -> bytes:
    """The answer's body, up to one byte more than a document may have."""
    asking = http.client.HTTPConnection(url.netloc)
    asking.sock = connection
    query = f"?{url.query}" if url.query else ""
    asking.request("GET", f"{url.path or '/'}{query}", headers={"User-Agent": "firstboot"})
    with asking.getresponse() as answer:
        if answer.status != http.client.OK:
            raise LocalError(_plain(f"the server answers {answer.status} {answer.reason}"))
        data = answer.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES and answer.length:
            raise LocalError("the connection ended before the document did")
        return data


def _plain(text: str) -> str:
    """What somebody else wrote, as a part of a sentence of ours."""
    return "".join(c for c in text[:200] if c.isprintable()).strip() or "it cannot be had"


# ---------------------------------------------------------------- a device


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
    return done.stdout
