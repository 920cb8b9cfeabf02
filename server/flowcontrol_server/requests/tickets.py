"""Pure. Tickets identify requests in Envoy's access log, and cannot be forged.

    INSTANCE.NUMBER.CODE

INSTANCE names the process that dispatched the request, NUMBER is its request id, and CODE is a
message authentication code of both under a key that never leaves the process. A client that reaches
the access-log port can guess request ids, but not the codes.

A ticket is text. A number in Envoy's dynamic metadata would be a double, exact below 2^53 only:
that holds a request id or a sufficient code, not both.
"""

from enum import Enum
from hashlib import blake2b
from hmac import compare_digest
from secrets import token_bytes, token_hex
from typing import Final, final

from flowcontrol_server.common.units import parse_whole

_CODE_BYTES: Final = 8
"""One guess in 2^64 is right."""
_DIGITS_MAX: Final = 19
"""Digits of a request id: 64 bits."""


class Flaw(Enum):
    """Why a ticket is not one of this process. The values are those of `log_join.EntryResult`."""

    FOREIGN = "foreign"
    FORGED = "forged"
    MALFORMED = "malformed"


@final
class Tickets:
    """Issues tickets and reads them.

    A process that takes over the requests of another one reads their complete tickets from the
    store of requests in flight, so it needs no key but its own.

    Args:
        instance: names the process, in hexadecimal digits.
        key: 16 to 64 random bytes, kept secret.
    """

    def __init__(self, instance: str, key: bytes) -> None:
        self.instance: Final = instance
        self._keyed = blake2b(digest_size=_CODE_BYTES, key=key)

    def issue(self, request_id: int) -> bytes:
        """Return the ticket of a request."""
        text = f"{self.instance}.{request_id}".encode()
        return text + b"." + self._code(text)

    def read(self, ticket: str) -> int | Flaw:
        """Return the request id of a ticket of this process, or why it is not one."""
        instance, _, rest = ticket.partition(".")
        number, _, code = rest.partition(".")
        request_id = parse_whole(number, _DIGITS_MAX)
        if request_id is None:
            return Flaw.MALFORMED
        if instance != self.instance:
            return Flaw.FOREIGN
        expected = self._code(f"{instance}.{number}".encode())
        if not compare_digest(expected, code.encode()):
            return Flaw.FORGED
        return request_id

    def _code(self, text: bytes) -> bytes:
        digest = self._keyed.copy()  # two thirds of the cost of hashing the key each time
        digest.update(text)
        return digest.hexdigest().encode()


TICKETS: Final = Tickets(token_hex(4), token_bytes(32))
"""The tickets of this process. Request ids begin at 1 in each process, and the log may report
requests that another replica, or a former process at this address, has dispatched."""
