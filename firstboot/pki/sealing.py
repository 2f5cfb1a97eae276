"""Texts that only those who hold the token can read or write: entries of a rendezvous."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from firstboot.pki.parts import expand
from firstboot.protocol.errors import RemoteError

_LABEL = b"firstboot 1 rendezvous"
_NONCE = 12  # bytes, random: NIST SP 800-38D allows 2^32 texts for one key


class Seal:
    """AES-256-GCM with a key that follows from the token, for one formation."""

    def __init__(self, token: str, formation_id: str) -> None:
        self._cipher = AESGCM(expand(token, formation_id, _LABEL, 32))

    def seal(self, text: bytes, about: bytes) -> bytes:
        """Encrypt `text`, and bind it to `about`, which stands beside it for all to read."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, text, about)

    def unseal(self, sealed: bytes, about: bytes) -> bytes:
        """The text; RemoteError unless a holder of the token sealed just this."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], about)
        except (InvalidTag, ValueError):
            raise RemoteError("this was not sealed with the formation's token") from None
