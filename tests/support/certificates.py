"""Certificates for tests, and the files that contain them."""

import socket
import ssl
from pathlib import Path
from typing import NamedTuple, final

import grpc
import trustme


@final
class Authority:
    """A certificate authority for one test."""

    def __init__(self) -> None:
        self.root = trustme.CA()

    @property
    def pem(self) -> bytes:
        """Its certificate, as PEM."""
        return bytes(self.root.cert_pem.bytes())

    def issue(self, *names: str) -> tuple[bytes, bytes]:
        """Return a new certificate and its key, as PEM."""
        issued = self.root.issue_cert(*(names or ("localhost", "127.0.0.1")))
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return chain, bytes(issued.private_key_pem.bytes())

    def client_context(self, shows: "Authority | None" = None) -> ssl.SSLContext:
        """Return the context of a client that trusts it, with HTTP/2."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.set_alpn_protocols(["h2"])
        if shows is not None:
            shows.root.issue_cert("client.example").configure_cert(context)
        return context

    def channel_credentials(self, shows: "Authority | None" = None) -> grpc.ChannelCredentials:
        """Return the channel credentials of a client that trusts it.

        Args:
            shows: authority of the client's certificate; None: no certificate.
        """
        certificate, key = shows.issue("client.example") if shows is not None else (None, None)
        return grpc.ssl_channel_credentials(self.pem, key, certificate)


class Visit(NamedTuple):
    """A connection that has ended."""

    answer: bytes
    """The answer; empty: the server refused."""
    session: ssl.SSLSession | None = None
    """A session to resume, if the server resumes any."""
    was_resumed: bool = False


def visit(
    port: int, context: ssl.SSLContext, say: bytes, session: ssl.SSLSession | None = None
) -> Visit:
    """Connect, resume the session if the server does, send `say` and wait for the answer."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
        ):
            tls.sendall(say)
            answer = tls.recv(100)  # with TLS 1.3 tickets come before it
            return Visit(answer, tls.session, bool(tls.session_reused))
    except (ssl.SSLError, ConnectionError):
        return Visit(b"")


def write_all_at_once(path: Path, content: bytes) -> None:
    """Replace a file atomically, as a rotation of certificates does."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


def write_pair(directory: Path, authority: Authority) -> None:
    """Write a new certificate and its key to certificate.pem and key.pem."""
    certificate, key = authority.issue()
    write_all_at_once(directory / "certificate.pem", certificate)
    write_all_at_once(directory / "key.pem", key)
