"""Settings and collaborators that all ext_proc calls share, at either door."""

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
BODY_S: Final = 0.005
"""How long a request waits, before it is parked, for a part of its body after its headers."""


@final
@dataclass(slots=True, kw_only=True)
class CallContext:
    """Settings and collaborators of all ext_proc calls; a change applies from the next answer."""

    gate: FlowGate
    """Where requests are parked."""
    intake: Intake = field(default_factory=Intake)
    """How requests are read."""
    encoder: Encoder = field(default_factory=Encoder)
    """Encodes replies."""
    may_decide: Callable[[], bool] = lambda: True
    """Whether this replica decides now. If not, streams end with UNAVAILABLE, and Envoy asks the
    next replica."""
    continue_on_fault: bool = False
    """Whether requests pass ungated after the engine has failed, or are refused."""
    secret: EnvoySecret | None = None
    """The secret that Envoy must present on each stream; None: none is needed."""
    trace_fields: tuple[str, ...] = ()
    """Names of the headers that carry a trace; empty: traces are off."""
    health: Health = field(default_factory=Health)
    """At the direct door: answers health checks."""
    access_log: AccessLog | None = None
    """At the direct door: takes Envoy's access log; None: it is not served."""
    limits: Http2Limits = field(default_factory=Http2Limits)
    """Limits of the connections of the direct door."""
    unseen_ns: int = 10_000_000_000
    """How long a request keeps its slot if no message reports its response."""
    body_refusals: int = 0
    """Parked requests refused because too many bytes of bodies were held."""
    is_closing: bool = False
    """At the direct door: streams end once they are answered, and new connections are refused."""
    chance: random.Random = field(default_factory=random.Random)
    """Spreads retries; not for secrets."""
    callbacks: contextvars.Context = field(default_factory=contextvars.copy_context)
    """Context of all callbacks at the direct door; otherwise asyncio would copy one per request."""
