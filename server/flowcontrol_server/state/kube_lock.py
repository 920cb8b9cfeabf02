"""The lease of the leader as a coordination.k8s.io Lease, with the semantics of client-go.

A replica counts the duration of a lease of another from the moment at which it saw the record
change, on its own clock, so clocks of different machines are never compared. An update names the
version that was read: of two replicas that try at once, one succeeds.
"""

import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final, final
from urllib.parse import quote

from flowcontrol.errors import FlowControlError
from flowcontrol_server.config.sources import Kubernetes
from flowcontrol_server.sources.kube_api import UNREACHABLE, ApiError, KubeApi, NoJsonError
from flowcontrol_server.state.election import clock_s
from flowcontrol_server.state.store import StateError

NOT_FOUND: Final = 404
CONFLICT: Final = 409
_TRIES: Final = 4
"""Requests of a standby within the duration of the lease."""
_NAME_MAX: Final = 63
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


@final
class KubeLock:
    """A lock; its token is the time at which the lease was acquired, in microseconds.

    If that is not later than the last token, the token is one more than the last. A missing Lease
    is created only after the duration of a lease, because the holder at the time of its deletion
    may still rely on it.

    Args:
        settings: of the connection to the API.
        pool: names the Lease.
        identity: of this process, unique among the replicas.
        duration_s: of the lease, in whole seconds.
    """

    def __init__(self, settings: Kubernetes, pool: str, identity: str, duration_s: float) -> None:
        self.retry_s = duration_s / _TRIES
        self._settings = settings
        self._name = lease_name(pool)
        self._identity = identity
        self._duration_s = round(duration_s)
        self._api: KubeApi | None = None
        self._seen: tuple[object, ...] = ()
        """Whether the record is missing, its holder, renewal and transitions, as last read."""
        self._seen_s = 0.0
        """When this state was first read."""

    async def acquire(self) -> int | None:
        """Take or renew the lease; return its token; None: another process holds it."""
        lease = await self._read()
        spec = (lease or {}).get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        seen = (lease is None, holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_s = seen, clock_s()
        if holder == self._identity:
            return await self._write("PUT", lease, spec)
        duration_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        if lease is None and clock_s() >= self._seen_s + duration_s:
            return await self._write("POST", {}, None)
        if (lease is None or holder) and clock_s() < self._seen_s + duration_s:
            return None
        return await self._write("PUT", lease, None)

    async def release(self) -> None:
        """Release the lease, if it is held by this process."""
        lease = await self._read()
        spec = (lease or {}).get("spec") or {}
        if lease is None or spec.get("holderIdentity") != self._identity:
            return
        now = datetime.now(UTC).strftime(_TIME)
        released = {**spec, "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": now}
        await self._send("PUT", {**lease, "spec": released})

    async def is_held_by_another(self) -> bool:
        """Return whether another process holds the lease."""
        lease = await self._read()
        holder = ((lease or {}).get("spec") or {}).get("holderIdentity") or ""
        return holder not in {"", self._identity}

    async def close(self) -> None:
        """Close the connections."""
        if self._api is not None:
            await self._api.close()

    async def _write(self, method: str, lease: Any, own: Any) -> int | None:
        """Write the record with this process as the holder; None: another process was faster.

        Args:
            method: POST for a new Lease, PUT for an existing one.
            lease: as read.
            own: its spec if this process holds it already; None: it does not.
        """
        now = datetime.now(UTC)
        before = lease.get("spec") or {}
        acquired = now
        if own is not None:
            acquired = _time(own.get("acquireTime")) or now
        elif (last := _time(before.get("acquireTime"))) is not None and last >= now:
            acquired = last + timedelta(microseconds=1)
        spec = {
            **before,
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration_s,
            "acquireTime": acquired.strftime(_TIME),
            "renewTime": now.strftime(_TIME),
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (own is None),
        }
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease.get("metadata") or {"name": self._name},
            "spec": spec,
        }
        if await self._send(method, body) is None:
            return None
        self._seen = (False, self._identity, spec["renewTime"], spec["leaseTransitions"])
        self._seen_s = clock_s()
        return round(acquired.timestamp() * 1e6)

    async def _read(self) -> Any:
        """Return the Lease; None: there is none."""
        return await self._send("GET", None)

    async def _send(self, method: str, body: Any) -> Any:
        """Return the answer; None: the object is missing, or has changed meanwhile."""
        try:
            api = await self._connected()
            path = f"/apis/coordination.k8s.io/v1/namespaces/{quote(api.namespace, safe='')}/leases"
            if method != "POST":
                path += f"/{quote(self._name, safe='')}"
            return await api.exchange(method, path, body)
        except ApiError as error:
            if error.status in {NOT_FOUND, CONFLICT}:
                return None
            message = f"availability: the Lease {self._name} cannot be used: {error}"
            raise StateError(message) from error
        except (*UNREACHABLE, NoJsonError, FlowControlError) as error:
            message = f"availability: the Kubernetes API cannot be reached: {error!r}"
            raise StateError(message) from error

    async def _connected(self) -> KubeApi:
        if self._api is None:
            self._api = await KubeApi.connect(self._settings)
        return self._api


def lease_name(pool: str) -> str:
    """Return the name of a pool's Lease, a DNS label, which a pool's name need not be.

    A name that had to be changed ends with a digest, so that two pools do not share a Lease. The
    chart generates the same names for its Role.
    """
    name = f"flowcontrol-{pool}"
    if len(name) <= _NAME_MAX and _LABEL.fullmatch(name):
        return name
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower())[: _NAME_MAX - 9].rstrip("-")
    return f"{plain}-{sha256(pool.encode()).hexdigest()[:8]}"


def _time(text: object) -> datetime | None:
    try:
        return datetime.strptime(str(text), _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None
