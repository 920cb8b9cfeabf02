"""The lease of the leader as an expiring key of Valkey or Redis."""

from typing import Final, final

from flowcontrol_server.state.valkey_client import ValkeyClient

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return redis.call('GET', KEYS[2])
end
if holder then return false end
local before = redis.call('GET', KEYS[2])
local now = redis.call('TIME')
local token = now[1] * 1000000 + now[2]
if not before then
  redis.call('SET', KEYS[2], string.format('%.0f', token))
  redis.call('SET', KEYS[1], '', 'PX', ARGV[2])
  return false
end
if token <= tonumber(before) then token = tonumber(before) + 1 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], string.format('%.0f', token))
return string.format('%.0f', token)
"""
"""A server without a token is new, or has lost its data. A leader that it has lost may still rely
on its lease, so no other replica is elected for the duration of a lease."""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_HOLDER = "return redis.call('GET', KEYS[1])"
_KEYS: Final = ["leader", "token"]
_TRIES: Final = 20
"""Requests of a standby within the duration of the lease."""


@final
class ValkeyLock:
    """A lock; its token is the server's time in microseconds, or one more than the last token.

    Args:
        client: connections to the server.
        identity: of this process, unique among the replicas.
        duration_ms: of the lease.
    """

    def __init__(self, client: ValkeyClient, identity: str, duration_ms: int) -> None:
        self._client = client
        self._identity = identity
        self._duration_ms = duration_ms
        self.retry_s = duration_ms / 1000 / _TRIES

    async def acquire(self) -> int | None:
        """Take or renew the lease; return its token; None: another process holds it."""
        token = await self._client.run(_ACQUIRE, _KEYS, self._identity, self._duration_ms)
        return None if token is None else int(token)

    async def release(self) -> None:
        """Release the lease, if it is held by this process."""
        await self._client.run(_RELEASE, _KEYS[:1], self._identity)

    async def is_held_by_another(self) -> bool:
        """Return whether another process holds the lease."""
        holder = await self._client.run(_HOLDER, _KEYS[:1])
        return bool(holder) and holder != self._identity

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
