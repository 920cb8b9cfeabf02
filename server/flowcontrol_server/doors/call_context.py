"""Settings and collaborators that all ext_proc calls share, whichever door they come through."""

import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

from flowcontrol_server.doors.access_log import AccessLog
from flowcontrol_server.doors.envoy_secret import EnvoySecret
from flowcontrol_server.doors.health import Health
from flowcontrol_server.doors.http2.limits import Http2Limits
from flowcontrol_server.requests.classify import Intake
from flowcontrol_server.requests.codec import Encoder
from flowcontrol_server.requests.gate import FlowGate

STANDBY: Final = "another replica decides"
"""The message of a stream that ends with UNAVAILABLE."""


@final
@dataclass(slots=True, kw_only=True)
class CallContext:
    """What all ext_proc calls share; a change applies from the next answer on."""

    gate: FlowGate
    """Where requests are parked."""
    intake: Intake = field(default_factory=Intake)
    """How requests are read."""
    encoder: Encoder = field(default_factory=Encoder)
    """How answers are written."""
    may_decide: Callable[[], bool] = lambda: True
    """Whether this replica decides now; else streams end with UNAVAILABLE, which Envoy takes to the
    next."""
    continue_on_fault: bool = False
    """What becomes of requests when the engine has failed."""
    secret: EnvoySecret | None = None
    """What Envoy must show on each stream; None: nothing."""
    trace_fields: tuple[str, ...] = ()
    """Names of headers that tell of a trace; none while traces are off."""
    health: Health = field(default_factory=Health)
    """At the direct door: answers health checks."""
    access_log: AccessLog | None = None
    """At the direct door: takes what Envoy reports of finished requests; None: it is not served."""
    limits: Http2Limits = field(default_factory=Http2Limits)
    """What a client of the direct door may ask for."""
    unseen_ns: int = 10_000_000_000
    """How long a request keeps its slot whose response no message tells of."""
    body_refusals: int = 0
    """Parked requests refused because too much of bodies was held."""
    is_closing: bool = False
    """At the direct door: streams end once they are answered, and new connections are refused."""
    chance: random.Random = field(default_factory=random.Random)
    """Spreads retries, keeps no secret."""
    callbacks: contextvars.Context = field(default_factory=contextvars.copy_context)
    """The context of all callbacks at the direct door: asyncio would copy one for each request."""
