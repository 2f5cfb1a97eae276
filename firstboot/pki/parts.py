"""What both kinds of certificates share: reading hostile DER, moments, encodings."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from firstboot.protocol.errors import RemoteError

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER
RELEASED = 1_795_000_000.0  # Unix time, November 2026; a clock before it was never set
# What parsing hostile DER may raise; most of these do not derive from one another.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    InternalError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)


def expand(token: str, formation_id: str, label: bytes, length: int) -> bytes:
    """Bytes that follow from the token for one formation and one use (HKDF-SHA256, RFC 5869).

    The salt is a hash because HMAC pads short keys with zeros: two ids must never collide.
    """
    salt = hashlib.sha256(formation_id.encode()).digest()
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=label).derive(
        token.encode()
    )


def moment(now: float | None) -> datetime:
    return datetime.fromtimestamp(int(time.time() if now is None else now), UTC)


def beginning(now: float | None) -> datetime:
    """From when a certificate made then is valid.

    No clock that is right is before this release, so with that as the latest beginning nothing is
    dated into the future, however far ahead the clock of the master is.
    """
    return min(moment(now), moment(RELEASED)) - timedelta(hours=24)


@contextmanager
def reading(mistake: str) -> Iterator[None]:
    """Around parsing what a peer sent: what that raises is the peer's mistake.

    What it warns of is nobody's concern here; a peer must not be able to write to our log.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UNREADABLE:
            raise RemoteError(mistake) from None


def expiry(certificate: x509.Certificate) -> datetime:
    # cryptography 42 introduced the aware property and deprecated the naive one.
    aware: datetime | None = getattr(certificate, "not_valid_after_utc", None)
    return certificate.not_valid_after.replace(tzinfo=UTC) if aware is None else aware
