"""Leases in Valkey or Redis: one hash for each pool, with one field for each lease."""

import json
from typing import Final, final

import structlog

from flowcontrol_server.state.store import Batch, Contents, records_of, to_plain
from flowcontrol_server.state.valkey_client import ValkeyClient

CHUNK: Final = 1000
"""Leases written by one script, which blocks the server for about a millisecond."""
_OPEN = """
local fence = tonumber(redis.call('GET', KEYS[1]) or '0')
if fence > tonumber(ARGV[1]) then return redis.error_reply('FENCED') end
redis.call('SET', KEYS[1], ARGV[1])
local memory = redis.pcall('INFO', 'memory')
local evicts = ''
if type(memory) == 'string' and not memory:find('maxmemory:0%s') then
  evicts = memory:match('maxmemory_policy:(%S+)') or ''
end
return {redis.call('HGETALL', KEYS[2]), redis.call('GET', KEYS[3]), evicts}
"""
"""INFO may be forbidden, and scripts cannot call CONFIG."""
_WRITE = """
local fence = redis.call('GET', KEYS[1])
if fence and tonumber(fence) > tonumber(ARGV[1]) then return redis.error_reply('FENCED') end
if not fence and ARGV[2] ~= '1' then return redis.error_reply('the server has lost its data') end
if fence ~= ARGV[1] then redis.call('SET', KEYS[1], ARGV[1]) end
if ARGV[2] == '1' then redis.call('DEL', KEYS[2]) end
if ARGV[3] ~= '' then redis.call('SET', KEYS[3], ARGV[3]) end
local puts = tonumber(ARGV[4])
for i = 5, 4 + 2 * puts, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = 5 + 2 * puts, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return 'OK'
"""
_NO_EVICTION: Final = "noeviction"
_KEYS: Final = ["fence", "leases", "memory"]
_log = structlog.get_logger()


@final
class ValkeyStore:
    """A store for several replicas: the last to open it writes, the earlier ones are fenced off.

    Each chunk of a batch is written completely or not at all. After a failure everything is written
    again, which also restores a server that has lost its data.

    Args:
        client: connections to the server.
    """

    def __init__(self, client: ValkeyClient) -> None:
        self._client = client
        self._token: str | None = None

    async def open(self, token: int) -> Contents:
        """Take over the store and return its content."""
        leases, memory, policy = await self._client.run(_OPEN, _KEYS, str(token))
        self._token = str(token)
        if policy not in {"", _NO_EVICTION}:
            problem = f"maxmemory-policy must be {_NO_EVICTION}: a full server evicts leases"
            _log.warning("valkey_evicts_keys", policy=policy, problem=problem)
        return Contents(records_of(dict(zip(leases[::2], leases[1::2], strict=True))), memory)

    async def write(self, batch: Batch) -> None:
        """Write changes, `CHUNK` at a time."""
        puts = [(each.ticket, json.dumps(to_plain(each))) for each in batch.put]
        removed = [*batch.removed]
        is_whole, memory = batch.is_whole, batch.memory or ""
        while True:
            now, puts = puts[:CHUNK], puts[CHUNK:]
            gone, removed = removed[:CHUNK], removed[CHUNK:]
            fields = [text for pair in now for text in pair]
            await self._client.run(
                _WRITE, _KEYS, self._token, int(is_whole), memory, len(now), *fields, *gone
            )
            is_whole, memory = False, ""
            if not puts and not removed:
                return

    async def close(self) -> None:
        """Close the store; its creator closes the client."""
