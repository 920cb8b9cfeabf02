"""TLS for every door: PEM files, reloaded when they change.

To rotate certificates, cert-manager, a Kubernetes secret or a script replaces the files, and the
next handshake uses the new ones. Comparing the stamps of three files takes microseconds, a
handshake a thousand times that, so nothing watches the files and nothing is restarted. Streams
under way keep their connection. Files that do not match, for example because only one has been
replaced yet, are ignored.

No session is resumed on the direct door: a resumed session presents no certificate, so a client
whose authority is no longer trusted could get in with an old session. grpcio cannot disable
sessions; there, new files end all sessions.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, final

import grpc
import structlog
from pydantic import Field, ValidationInfo, model_validator

from flowcontrol_server.common.sections import PathBeside, Section, broken, is_read_elsewhere

_log = structlog.get_logger()
_Stamp = tuple[int, int, int]


class Tls(Section):
    """TLS of the gRPC doors. Relative paths start at the configuration file."""

    certificate: PathBeside | None = None
    """PEM file with the certificate of the gRPC ports, followed by its chain. Plain text if
    unset."""
    key: PathBeside | None = None
    """PEM file with the certificate's private key."""
    client_ca: PathBeside | None = None
    """PEM file with the certificate authorities for client certificates. If set, clients must
    present a certificate: mutual TLS."""
    self_signed: bool = Field(default=False, strict=True)
    """Only for `listen.extProc`: a certificate made at each start, and plain text on the same port.
    Gateways that use TLS to their endpoint picker without verifying it (kgateway, agentgateway,
    Envoy AI Gateway) need nothing more; Istio uses plain text. It authenticates neither side: use
    it only in a network you trust. Needs the extra kubernetes."""

    @model_validator(mode="after")
    def _can_be_used(self, info: ValidationInfo) -> Self:
        if (self.certificate is None) != (self.key is None):
            rule = "must have both certificate and key, or neither"
            raise broken(rule)
        if self.client_ca is not None and self.certificate is None:
            rule = "must have certificate and key where clientCa is set"
            raise broken(rule)
        if self.self_signed and self.certificate is not None:
            rule = "must have no certificate, key and clientCa where selfSigned is true"
            raise broken(rule)
        if is_read_elsewhere(info):
            return self
        try:
            self.certificates()
        except OSError as error:
            rule = f"must name PEM files that belong together: {reason_of(error)}"
            raise broken(rule) from error
        return self

    def certificates(self) -> "Certificates | None":
        """Read the files; None: plain text.

        Raises:
            OSError: a file cannot be read, or they do not belong together.
        """
        if self.certificate is None or self.key is None:
            return None
        return Certificates(_Files(self.certificate, self.key, self.client_ca))


class _Files(NamedTuple):
    certificate: Path
    key: Path
    client_ca: Path | None

    def stamps(self) -> tuple[_Stamp, ...]:
        """Return values that change when a file is replaced."""
        stats = [path.stat() for path in self if path is not None]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


@dataclass(frozen=True, slots=True)
class _Loaded:
    stamps: tuple[_Stamp, ...]
    for_grpc: grpc.ServerCertificateConfiguration
    for_asyncio: ssl.SSLContext


@final
class Certificates:
    """The certificates of the doors, from the files as they are at each handshake.

    Called on the loop's thread and on grpc's own; the loaded files are replaced as a whole.

    Raises:
        OSError: a file cannot be read, or they do not belong together.
    """

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._loaded = _load(files)
        self._refused: tuple[_Stamp, ...] | None = None
        """Stamps of files that could not be loaded, so that the error is logged once."""

    @property
    def is_mutual(self) -> bool:
        """Whether clients must present a certificate."""
        return self._files.client_ca is not None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for a port of a grpc server."""
        given = self._loaded

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Return the configuration for this handshake; None: it is unchanged."""
            nonlocal given
            current = self._current()
            if current is given:
                return None
            given = current
            return current.for_grpc

        return grpc.dynamic_ssl_server_credentials(
            given.for_grpc,
            fetch,  # type: ignore[arg-type]  # grpc documents None, its stubs omit it
            require_client_authentication=self.is_mutual,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Return the context for a port of an asyncio server; ALPN selects HTTP/2."""

        def choose(connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
            """Use the current certificates, whatever host the client asks for."""
            connection.context = self._current().for_asyncio

        def fresh() -> ssl.SSLContext:
            """Return a context without a certificate and without a session."""
            context = server_context(is_mutual=self.is_mutual)
            context.sni_callback = choose  # called at every handshake, also without a name
            return context

        served = _ContextPerConnection(ssl.PROTOCOL_TLS_SERVER)
        served.fresh = fresh
        return served

    def _current(self) -> _Loaded:
        try:
            stamps = self._files.stamps()
            if stamps == self._loaded.stamps:
                return self._loaded
            self._loaded = _load(self._files)
        except OSError as error:
            self._log_once(error)
        else:
            _log.info("certificate_reloaded", certificate=str(self._files.certificate))
        return self._loaded

    def _log_once(self, error: OSError) -> None:
        try:
            stamps = self._files.stamps()
        except OSError:
            stamps = ()
        if stamps != self._refused:
            self._refused = stamps
            path = str(self._files.certificate)
            _log.error("certificate_not_reloaded", certificate=path, error=reason_of(error))


class _ContextPerConnection(ssl.SSLContext):
    """Serves each connection with a context of its own.

    OpenSSL keeps sessions in the context that a connection began with, and Python cannot disable
    that: without tickets, TLS 1.2 still resumes by session id. Here a context ends with its
    connection, and so do its sessions. This costs 0.2 ms, a handshake ten times that.
    """

    fresh: Callable[[], ssl.SSLContext]

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - the signature of ssl
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Begin a connection with a new context."""
        return self.fresh().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def client_credentials(
    ca: Path, certificate: Path | None, key: Path | None
) -> grpc.ChannelCredentials:
    """Return the credentials of a client's channel to such a door.

    Args:
        ca: PEM file with the authorities that sign the door's certificate.
        certificate: PEM file with the client's certificate; None: it presents none.
        key: PEM file with the private key of that certificate.

    Raises:
        OSError: a file cannot be read, or they do not belong together.
    """
    authorities = ca.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # grpc itself ignores text that is not PEM
    context.load_verify_locations(ca)
    if certificate is None or key is None:
        return grpc.ssl_channel_credentials(authorities)
    shown, its_key = certificate.read_bytes(), key.read_bytes()
    context.load_cert_chain(certificate, key, _no_password)
    return grpc.ssl_channel_credentials(authorities, its_key, shown)


def reason_of(error: OSError) -> str:
    """Return as text why TLS files cannot be used."""
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key does not match the certificate"
        return "a file is not PEM, or not of the expected kind"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def server_context(*, is_mutual: bool) -> ssl.SSLContext:
    """Return a context for HTTP/2 over TLS, still without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, 9.2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for TLS 1.2: none with CBC
    context.set_alpn_protocols(["h2"])
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    if is_mutual:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(files: _Files) -> _Loaded:
    stamps = files.stamps()
    certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
    client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
    context = server_context(is_mutual=files.client_ca is not None)
    context.load_cert_chain(files.certificate, files.key, _no_password)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
    if files.stamps() != stamps:
        message = "the files are being replaced"
        raise OSError(message)
    for_grpc = grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
    return _Loaded(stamps, for_grpc, context)


def _no_password() -> str:
    message = "the key must not have a password"
    raise OSError(message)
