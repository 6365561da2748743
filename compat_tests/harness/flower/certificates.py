"""Certificates and keys for servers on loopback, made anew for each test."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Certificates", "certificates", "node_key"]

PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Certificates:
    """Files of one server.

    Attributes:
        authority: certificate of who signed the server's.
        certificate: the server's, for ``127.0.0.1`` and ``localhost``.
        key: the server's private key.
    """

    authority: Path
    certificate: Path
    key: Path


def certificates(folder: Path) -> Certificates:
    """Make a certificate authority and a server's certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, name = _name("engine tests: authority"), _name("localhost")
    constraint = x509.BasicConstraints(ca=True, path_length=0)
    root = _signed(root_name, root_name, root_key, root_key, constraint)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    own = _signed(name, root_name, key, root_key, x509.SubjectAlternativeName(names))
    files = Certificates(*(folder / file for file in ("ca.crt", "server.pem", "server.key")))
    files.authority.write_bytes(root.public_bytes(PEM))
    files.certificate.write_bytes(own.public_bytes(PEM))
    traditional = serialization.PrivateFormat.TraditionalOpenSSL
    files.key.write_bytes(key.private_bytes(PEM, traditional, serialization.NoEncryption()))
    return files


def node_key(path: Path) -> Path:
    """Make a SuperNode's key pair ``path`` and ``path.pub`` (OpenSSH), and return the latter."""
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(PEM, openssh, serialization.NoEncryption()))
    public = path.with_name(path.name + ".pub")
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(*form))
    return public


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1))
    builder = builder.not_valid_after(now + timedelta(days=2))
    return builder.add_extension(extension, critical=False).sign(by, hashes.SHA256())
