"""How the double judges certificates, keys and kubeconfigs: at least as strictly as Go's TLS does.

Runs on Debian 12's cryptography 38 as well, which cannot verify a chain itself.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import re
import ssl
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)


class Refused(Exception):
    """What was given is not what Origin takes; the sentence says what, and where."""


def certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    """All certificates of a PEM text; at least one."""
    try:
        found = [x509.load_pem_x509_certificate(block) for block in _BLOCK.findall(pem)]
    except ValueError as error:
        raise Refused(f"{where}: not a certificate: {error}") from error
    if not found:
        raise Refused(f"{where}: there is no certificate in it")
    return found


def pair(certificate: bytes, key: bytes, where: str) -> x509.Certificate:
    """A certificate whose key this is."""
    leaf = certificates(certificate, where)[0]
    if _public(private_key(key, where).public_key()) != _public(leaf.public_key()):
        raise Refused(f"{where}: the key is not the certificate's")
    return leaf


# To check a key's numbers takes longer than all the rest.
_read_key = functools.lru_cache(64)(lambda pem: load_pem_private_key(pem, None))


def private_key(pem: bytes, where: str) -> rsa.RSAPrivateKey:
    try:
        key = _read_key(pem)
    except ValueError as error:
        raise Refused(f"{where}: not a private key: {error}") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise Refused(f"{where}: not an RSA key")
    return key


def public_key(pem: bytes, where: str) -> rsa.RSAPublicKey:
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise Refused(f"{where}: not a public key: {error}") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise Refused(f"{where}: not an RSA key")
    return key


def same_key(private: rsa.RSAPrivateKey, public: rsa.RSAPublicKey) -> bool:
    return _public(private.public_key()) == _public(public)


def _public(key: Any) -> bytes:
    found: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return found


def _moment(certificate: x509.Certificate, name: str) -> datetime:
    found = getattr(certificate, f"{name}_utc", None)
    moment: datetime = found or getattr(certificate, name).replace(tzinfo=UTC)
    return moment


def signer(pem: bytes, where: str) -> list[x509.Certificate]:
    """Certificates that may sign, and are valid now."""
    found = certificates(pem, where)
    for each in found:
        _valid_now(each, where)
        try:
            constraints = each.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            raise Refused(f"{where}: not a signer") from None
        if not constraints.ca:
            raise Refused(f"{where}: not a signer")
    return found


def _valid_now(certificate: x509.Certificate, where: str) -> None:
    now = datetime.now(UTC)
    if now < _moment(certificate, "not_valid_before"):
        raise Refused(f"{where}: not valid yet")
    if now > _moment(certificate, "not_valid_after"):
        raise Refused(f"{where}: expired")


def issued(
    leaf: x509.Certificate,
    signers: Iterable[x509.Certificate],
    use: x509.ObjectIdentifier,
    where: str,
) -> None:
    """It is valid now, one of `signers` signed it, and it is for this use."""
    _valid_now(leaf, where)
    try:
        uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        raise Refused(f"{where}: says nothing of its use") from None
    if use not in uses:
        raise Refused(f"{where}: not for this use ({use._name})")
    if not any(_signed(leaf, each) for each in signers):
        raise Refused(f"{where}: signed by an unknown authority")


def _signed(leaf: x509.Certificate, by: x509.Certificate) -> bool:
    key, algorithm = by.public_key(), leaf.signature_hash_algorithm
    if leaf.issuer != by.subject or not isinstance(key, rsa.RSAPublicKey) or algorithm is None:
        return False
    try:
        key.verify(leaf.signature, leaf.tbs_certificate_bytes, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True


def covers(leaf: x509.Certificate, hosts: Iterable[str], where: str) -> None:
    """Its alternative names have every one of these hosts."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise Refused(f"{where}: has no alternative names") from None
    known = {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    dns = set(names.get_values_for_type(x509.DNSName))
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            found = host in dns
        else:
            found = host in known
        if not found:
            raise Refused(f"{where}: not valid for {host}")


def subject(leaf: x509.Certificate) -> tuple[str, set[str]]:
    """User and groups, as Kubernetes reads them."""
    user = [str(a.value) for a in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return "".join(user[:1]), {str(a.value) for a in groups}


# ---------------------------------------------------------------- kubeconfigs


@dataclass(frozen=True, slots=True)
class Kubeconfig:
    """The server and the credentials of the current context."""

    server: str
    authority: bytes
    certificate: bytes
    key: bytes

    def context(self) -> ssl.SSLContext:
        """For a client that proves itself by the certificate."""
        found = ssl.create_default_context(cadata=self.authority.decode())
        with tempfile.NamedTemporaryFile() as both:
            both.write(self.certificate + b"\n" + self.key)
            both.flush()
            found.load_cert_chain(both.name)
        return found


def kubeconfig(path: Path, use: str) -> Kubeconfig:
    """Read, and checked: its client certificate is signed by the authority it names."""
    try:
        tree = yaml.safe_load(path.read_text())
        contexts = {c["name"]: c["context"] for c in tree["contexts"]}
        context = contexts[tree["current-context"]]
        cluster = {c["name"]: c["cluster"] for c in tree["clusters"]}[context["cluster"]]
        user = {u["name"]: u["user"] for u in tree["users"]}[context["user"]]
        found = Kubeconfig(
            cluster["server"],
            base64.b64decode(cluster["certificate-authority-data"], validate=True),
            base64.b64decode(user["client-certificate-data"], validate=True),
            base64.b64decode(user["client-key-data"], validate=True),
        )
    except OSError as error:
        raise Refused(f"{use}: {path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, binascii.Error) as error:
        raise Refused(f"{use}: {path}: not a kubeconfig: {error!r}") from error
    leaf = pair(found.certificate, found.key, str(path))
    issued(leaf, signer(found.authority, str(path)), CLIENT, str(path))
    return found
