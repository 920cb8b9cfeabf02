"""A self-signed certificate, for clients that use TLS and verify nothing.

Key and certificate are made when the service starts, and exist only in memory.
"""

import os
import ssl
from datetime import UTC, datetime, timedelta
from typing import Final

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.extras import missing
from flowcontrol_server.doors.tls import server_context

_NAME: Final = "flowcontrol"
_VALID_FOR: Final = timedelta(days=3_650)
"""Longer than any process runs; each start makes a new certificate."""
_CLOCKS_DIFFER_BY: Final = timedelta(days=1)


def self_signed_context() -> ssl.SSLContext:
    """Return an SSL context for a port, with a certificate made now and HTTP/2 by ALPN.

    Raises:
        FlowControlError: the extra is not installed.
    """
    context = server_context(is_mutual=False)
    # ssl reads certificates only from files, so this file is in memory.
    descriptor = os.memfd_create("certificate")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(_pem())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def _pem() -> bytes:
    try:
        from cryptography import x509  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415 - likewise
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        message = f"tls.selfSigned: {missing(error, 'kubernetes')}"
        raise FlowControlError(message) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER_BY)
        .not_valid_after(now + _VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
