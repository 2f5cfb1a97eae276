"""A payload's own authorities: RSA keys, signers, requests and certificates as `Leaf` rows say.

RSA with SHA-256 throughout, keys as PKCS#1 in PEM: what programs of 2017 write and read. Nothing
here keeps a serial number; whoever calls must never use one twice.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Iterator
from datetime import timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firstboot.pki.parts import DER, PEM, UNREADABLE, beginning, moment, reading
from firstboot.protocol.credentials import Leaf, Signer, is_address
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.messages import MAX_BLOB
from firstboot.protocol.model import Profile

EXPONENT = 65537
LEAF_BITS = 2048
MAX_LEAF_REQUEST = 4096  # bytes; an RSA-2048 request with its subject has about 700
_USAGES = {
    Profile.SERVER: (ExtendedKeyUsageOID.SERVER_AUTH,),
    Profile.CLIENT: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Profile.PEER: (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
}
_POINT = 65  # bytes of an uncompressed point on P-256 (SEC 1, section 2.3.3)


def make_rsa(bits: int = LEAF_BITS) -> bytes:
    """A new RSA private key (PKCS#1, PEM, not encrypted)."""
    key = rsa.generate_private_key(EXPONENT, bits)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(PEM, form, serialization.NoEncryption())


def public_half(key: bytes) -> bytes:
    """The public key of a private one (SubjectPublicKeyInfo, PEM)."""
    return _rsa(key).public_key().public_bytes(PEM, _SPKI)


def key_to_der(pem: bytes) -> bytes:
    """A private key, shorter: PKCS#1, DER."""
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return _rsa(pem).private_bytes(DER, form, serialization.NoEncryption())


def key_to_pem(der: bytes) -> bytes:
    """The inverse of `key_to_der`; RemoteError if it is no RSA key."""
    with reading("a private key cannot be read"):
        key = serialization.load_der_private_key(der, None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise RemoteError("a private key is not an RSA key")
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(PEM, form, serialization.NoEncryption())


def key_of_request(csr: bytes) -> str:
    """SHA-256 (hex) of the public key a request names; RemoteError if it cannot be read."""
    with reading("the request cannot be read"):
        public = x509.load_der_x509_csr(csr).public_key().public_bytes(DER, _SPKI)
    return hashlib.sha256(public).hexdigest()


def make_signer(row: Signer, key: bytes, now: float) -> bytes:
    """The self-signed certificate (PEM) of that authority, made at `now` (Unix time)."""
    private = _rsa(key)
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, f"{row.common_name}@{int(now)}")
    name = x509.Name([common_name])
    builder = _builder(name, name, private.public_key(), now, row.days)
    builder = builder.serial_number(row.own_serial or x509.random_serial_number())
    constraints = x509.BasicConstraints(ca=True, path_length=row.path_length)
    builder = builder.add_extension(constraints, critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    return builder.sign(private, hashes.SHA256()).public_bytes(PEM)


def make_leaf_request(key: bytes, row: Leaf) -> bytes:
    """A request (DER PKCS#10) for this key and that row's subject."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(row))
    return builder.sign(_rsa(key), hashes.SHA256()).public_bytes(DER)


def sign_leaf(
    row: Leaf, csr: bytes, signer: Signer, certificate: bytes, key: bytes, serial: int, now: float
) -> bytes:
    """The certificate (DER) that row asks for; RemoteError unless the request is in order.

    `certificate` and `key` are the signer's (PEM). What the certificate says comes from the row
    alone: a request in any other name is refused, and named; so is one that asks for extensions.
    """
    public = _requested(row, csr)
    issuer, private = _load(certificate), _rsa(key)
    builder = _builder(_subject(row), issuer.subject, public, now, row.days).serial_number(serial)
    none = x509.BasicConstraints(ca=False, path_length=None)
    builder = builder.add_extension(none, critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=not signer.openssl)
    builder = builder.add_extension(x509.ExtendedKeyUsage(_USAGES[row.use]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key())
    builder = builder.add_extension(identifier, critical=False)
    names = list(_names(row, signer.openssl))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(private, hashes.SHA256()).public_bytes(DER)


def check_leaf(row: Leaf, der: bytes, key: bytes, signer: Signer, certificate: bytes) -> None:
    """RemoteError unless `der` is what the row asks for, for this key, from that signer.

    `certificate` is the signer's (DER). Dates are not looked at: the clock may still be unset.
    """
    if len(der) > MAX_BLOB:
        raise RemoteError(f"the certificate {row.name} is too large")
    with reading(f"the certificate {row.name} cannot be read"):
        leaf = x509.load_der_x509_certificate(der)
        issuer = x509.load_der_x509_certificate(certificate)
        reason = _why_not(row, leaf, issuer, _rsa(key).public_key(), signer)
    if reason:
        raise RemoteError(f"the certificate {row.name} {reason}")


def check_signer(row: Signer, certificate: bytes) -> None:
    """RemoteError unless these bytes (DER) are a certificate of that authority's, by itself."""
    if len(certificate) > MAX_BLOB:
        raise RemoteError(f"the certificate of the {row.name} is too large")
    with reading(f"the certificate of the {row.name} cannot be read"):
        found = x509.load_der_x509_certificate(certificate)
        common = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        constraints = found.extensions.get_extension_for_class(x509.BasicConstraints).value
        named = [str(c.value).partition("@")[0] for c in common]
        sound = named == [row.common_name] and constraints.ca and _signed_by(found, found)
    if not sound:
        raise RemoteError(f"the certificate of the {row.name} is not that of {row.common_name}")


def index_line(der: bytes) -> str:
    """A certificate's line in the database of openssl-ca(1)."""
    found = x509.load_der_x509_certificate(der)
    ends = found.not_valid_after if not hasattr(found, "not_valid_after_utc") else None
    ends = ends or found.not_valid_after_utc.replace(tzinfo=None)
    common = str(found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    serial = hex_serial(found.serial_number)
    return f"V\t{ends:%y%m%d%H%M%SZ}\t\t{serial}\tunknown\t/CN={common}\n"


def hex_serial(number: int) -> str:
    """A serial number as serial files hold it: upper-case hexadecimal, an even length."""
    digits = f"{number:X}"
    return digits if len(digits) % 2 == 0 else f"0{digits}"


# ---------------------------------------------------------------- sealing


def seal(certificate: bytes, secret: bytes, about: str) -> bytes:
    """`secret` encrypted to the P-256 key of a member's certificate (DER), bound to `about`.

    Ephemeral ECDH, HKDF-SHA256 over both public keys, AES-256-GCM: the shape of RFC 9180's base
    mode. The channel encrypts as well; sealed, a secret may pass through events and the history.
    """
    public = x509.load_der_x509_certificate(certificate).public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise LocalError("secrets are sealed to P-256 keys only")
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    point = _point(ephemeral.public_key())
    cipher = _cipher(ephemeral.exchange(ec.ECDH(), public), point + _point(public), about)
    nonce = os.urandom(12)
    return point + nonce + cipher.encrypt(nonce, secret, about.encode())


def unseal(key: bytes, sealed: bytes, about: str) -> bytes:
    """What `seal` hid for the holder of `key` (P-256, PEM); RemoteError if it is not for it."""
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    point, nonce, hidden = sealed[:_POINT], sealed[_POINT : _POINT + 12], sealed[_POINT + 12 :]
    try:
        ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        shared = private.exchange(ec.ECDH(), ephemeral)
        cipher = _cipher(shared, point + _point(private.public_key()), about)
        return cipher.decrypt(nonce, hidden, about.encode())
    except (InvalidTag, *UNREADABLE):
        raise RemoteError(f"the sealed {about} is not for this host") from None


def _cipher(shared: bytes, points: bytes, about: str) -> AESGCM:
    info = b"firstboot 1 sealed " + about.encode()
    return AESGCM(HKDF(hashes.SHA256(), 32, salt=points, info=info).derive(shared))


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    form = serialization.PublicFormat.UncompressedPoint
    return key.public_bytes(serialization.Encoding.X962, form)


# ---------------------------------------------------------------- parts

_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def _rsa(pem: bytes) -> rsa.RSAPrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except UNREADABLE:
        raise LocalError("a private key on this host cannot be read") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise LocalError("a private key on this host is not an RSA key")
    return key


def _load(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except UNREADABLE:
        raise LocalError("a signer's certificate on this host cannot be read") from None


def _subject(row: Leaf) -> x509.Name:
    """All organizations in one relative name, as Go writes several of them."""
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in row.organizations]
    named = [x509.NameAttribute(NameOID.COMMON_NAME, row.subject)]
    return x509.Name([x509.RelativeDistinguishedName(part) for part in (groups, named) if part])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey, now: float, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .not_valid_before(beginning(now))
        .not_valid_after(moment(now) + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(row: Leaf, openssl: bool) -> Iterator[x509.GeneralName]:
    """The subject alternative names, in the order in which each program writes them."""
    hosts = row.names if openssl else sorted(row.names)
    addresses = [host for host in hosts if is_address(host)]
    names = [host for host in hosts if not is_address(host)]
    numbers = [x509.IPAddress(ipaddress.ip_address(host)) for host in addresses]
    if openssl:
        yield from (*numbers, *map(x509.DNSName, names))
    else:
        yield from (*map(x509.DNSName, (*names, *addresses)), *numbers)


def check_leaf_request(row: Leaf, csr: bytes) -> None:
    """RemoteError unless `sign_leaf` would sign that request."""
    _requested(row, csr)


def _requested(row: Leaf, csr: bytes) -> rsa.RSAPublicKey:
    if len(csr) > MAX_LEAF_REQUEST:
        raise RemoteError(f"the request for {row.name} has {len(csr)} bytes; that is too large")
    with reading(f"the request for {row.name} cannot be read"):
        request = x509.load_der_x509_csr(csr)
        subject, attributes, key = request.subject, list(request.attributes), request.public_key()
        algorithm, proven = request.signature_hash_algorithm, request.is_signature_valid
        asked = subject.rfc4514_string()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != LEAF_BITS:
        raise RemoteError(f"the request for {row.name} is not for an RSA key of {LEAF_BITS} bits")
    if key.public_numbers().e != EXPONENT:
        raise RemoteError(f"the request for {row.name} is for a key with an odd exponent")
    if not proven or not isinstance(algorithm, hashes.SHA256):
        raise RemoteError(f"the request for {row.name} is not signed by the key it names")
    if attributes:
        raise RemoteError(f"the request for {row.name} asks for extensions or attributes")
    if subject != _subject(row):
        wanted = _subject(row).rfc4514_string()
        shown = "".join(c if c.isprintable() else "?" for c in asked)[:200]
        raise RemoteError(f"the request for {row.name} names {shown}, but this host is {wanted}")
    return key


def _why_not(
    row: Leaf,
    leaf: x509.Certificate,
    issuer: x509.Certificate,
    public: rsa.RSAPublicKey,
    signer: Signer,
) -> str:
    """What is wrong with a certificate, or nothing. Parsing errors pass through."""
    if leaf.issuer != issuer.subject or not _signed_by(leaf, issuer):
        return f"is not signed by the {signer.name}"
    theirs = leaf.public_key()  # keys themselves are compared since cryptography 40 only
    if (
        not isinstance(theirs, rsa.RSAPublicKey)
        or theirs.public_numbers() != public.public_numbers()
    ):
        return "is for another key"
    if leaf.subject != _subject(row):
        return "is for another name"
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    if set(usage) != set(_USAGES[row.use]) or constraints.ca:
        return "is for another use"
    expected = list(_names(row, signer.openssl))
    if expected:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if list(found) != expected:
            return "is for other hosts"
    return ""


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    algorithm, key = certificate.signature_hash_algorithm, issuer.public_key()
    if not isinstance(algorithm, hashes.SHA256) or not isinstance(key, rsa.RSAPublicKey):
        return False
    signature, signed = certificate.signature, certificate.tbs_certificate_bytes
    try:
        key.verify(signature, signed, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        return False
    return True
