"""Certificates for tests, and files that hold them."""

import ssl
from pathlib import Path
from typing import final

import grpc
import trustme


@final
class Authority:
    """An authority of certificates, made for one test."""

    def __init__(self) -> None:
        self.root = trustme.CA()

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return bytes(self.root.cert_pem.bytes())

    def issue(self, *names: str) -> tuple[bytes, bytes]:
        """Return a new certificate and its key, as PEM."""
        issued = self.root.issue_cert(*(names or ("localhost", "127.0.0.1")))
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return chain, bytes(issued.private_key_pem.bytes())

    def client_context(self, shows: "Authority | None" = None) -> ssl.SSLContext:
        """Return what a client that trusts it connects with, over HTTP/2."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.set_alpn_protocols(["h2"])
        if shows is not None:
            shows.root.issue_cert("client.example").configure_cert(context)
        return context

    def channel_credentials(self, shows: "Authority | None" = None) -> grpc.ChannelCredentials:
        """Return what a client that trusts it opens a channel with.

        Args:
            shows: whose certificate the client shows, if any.
        """
        certificate, key = shows.issue("client.example") if shows is not None else (None, None)
        return grpc.ssl_channel_credentials(self.pem, key, certificate)


def write_all_at_once(path: Path, content: bytes) -> None:
    """Replace a file as whoever rotates certificates does."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


def write_pair(directory: Path, authority: Authority) -> None:
    """Write a new certificate and its key into certificate.pem and key.pem."""
    certificate, key = authority.issue()
    write_all_at_once(directory / "certificate.pem", certificate)
    write_all_at_once(directory / "key.pem", key)
