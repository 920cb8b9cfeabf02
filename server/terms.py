"""What holds for every call, whichever door it comes through."""

import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from server.classify import Intake
from server.codec import Encoder
from server.gate import FlowGate
from server.http2.limits import Http2Limits


@final
@dataclass(slots=True, kw_only=True)
class Terms:
    """What holds for every call at either door; what is changed here counts for the next answer."""

    gate: FlowGate
    """Where requests are parked."""
    intake: Intake = field(default_factory=Intake)
    """How requests are read."""
    encoder: Encoder = field(default_factory=Encoder)
    """How answers are written."""
    continue_on_fault: bool = False
    """What becomes of requests when the engine has failed."""
    trace_fields: tuple[str, ...] = ()
    """Names of headers that tell of a trace; none while traces are off."""
    health: Callable[[bytes], bytes | None] = lambda _request: None
    """At the direct door: answers a health check, None for an unknown service; may raise
    MalformedMessageError."""
    limits: Http2Limits = field(default_factory=Http2Limits)
    """What a client of the direct door may ask for."""
    is_closing: bool = False
    """At the direct door requests in flight are let go, and none become so."""
    chance: random.Random = field(default_factory=random.Random)
    """Spreads retries, keeps no secret."""
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """One for all callbacks at the direct door: asyncio would copy one for each request."""
