"""Endpoints by DNS: the addresses of names, and the targets of SRV records, asked again and again.

c-ares rather than getaddrinfo: that would take a thread for every question, knows no SRV records
and does not tell how long an answer lives. c-ares reads the system's configuration and hosts file
all the same.

No such name, or no such record, is an answer: nothing is there (a headless Kubernetes service says
so when it has no ready pod). Anything else that goes wrong is none: what was known stays known.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from socket import AF_INET, AF_INET6, SOCK_STREAM
from typing import NamedTuple, final

import aiodns
import pycares
import structlog

from server.addresses import Address
from server.settings_sources import Dns
from server.sources.backoff import Backoff
from server.sources.endpoints import Endpoint

TIMEOUT_S = 2.0
TRIES = 2
SOONEST_S = 1.0
"""However short an answer lives, it is not asked for again sooner."""
ANSWERS_MAX = 10_000
"""Endpoints that one question may bring."""
_NOTHING = frozenset(
    (pycares.errno.ARES_ENODATA, pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENONAME)
)
_FAMILIES = {
    "prefer-ipv4": (AF_INET, AF_INET6),
    "ipv4": (AF_INET,),
    "ipv6": (AF_INET6,),
    "all": (AF_INET, AF_INET6),
}
_log = structlog.get_logger()


class _Answer(NamedTuple):
    addresses: frozenset[str]
    """host:port"""
    lives_s: float | None
    """How long the answer may be kept; None: it does not say."""


_Question = Callable[[aiodns.DNSResolver], Awaitable[_Answer]]


@final
class DnsEndpoints:
    """Resolves names to endpoints. Owner: the loop.

    Args:
        settings: what to ask, whom and how often.
    """

    def __init__(self, settings: Dns) -> None:
        self.error_count = 0
        """Questions that got no answer since the start."""
        self.problems: dict[str, str] = {}
        """Those that last got none, by name."""
        self._settings = settings
        self._servers = [str(address) for address in settings.servers] or None
        self._known: dict[str, frozenset[str]] = {}
        self._asked: set[str] = set()
        self._told: frozenset[str] | None = None
        self._chance = random.Random()  # noqa: S311 - spreads questions, keeps no secret

    async def follow(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Tell the endpoints whenever they differ from what was told before, until cancelled.

        The first time, once every name has been asked and any has answered.
        """
        questions: dict[str, _Question] = {
            str(name): partial(self._of_name, name=name) for name in self._settings.names
        }
        questions |= {name: partial(self._of_srv, name=name) for name in self._settings.srv}
        async with asyncio.TaskGroup() as group:
            for name, ask in questions.items():
                group.create_task(self._keep_asking(name, ask, len(questions), changed))

    async def _keep_asking(
        self,
        name: str,
        ask: _Question,
        question_count: int,
        changed: Callable[[tuple[Endpoint, ...]], None],
    ) -> None:
        interval_s = max(self._settings.interval / 1e9, SOONEST_S)
        backoff = Backoff(SOONEST_S / 2, interval_s, self._chance.random)
        while True:
            # A new one for every question, at 0.1 ms: each reads the system's configuration anew,
            # and none has a cache, which would keep an answer as long as it lives.
            resolver = aiodns.DNSResolver(self._servers, timeout=TIMEOUT_S, tries=TRIES)
            try:
                answer = await ask(resolver)
            except aiodns.error.DNSError as error:
                self.error_count += 1
                if name not in self.problems:
                    _log.warning("name_not_resolved", name=name, problem=str(error.args[-1]))
                self.problems[name] = str(error.args[-1])
                wait_s = backoff.next_s()
            else:
                backoff.reset()
                if self.problems.pop(name, None) is not None:
                    _log.info("name_resolved_again", name=name)
                self._known[name] = answer.addresses
                lives_s = interval_s if answer.lives_s is None else answer.lives_s
                wait_s = min(interval_s, max(lives_s, SOONEST_S))
            finally:
                await resolver.close()
            self._asked.add(name)
            if len(self._asked) == question_count and self._known:
                self._tell(changed)
            await asyncio.sleep(wait_s)

    def _tell(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        addresses = frozenset[str]().union(*self._known.values())
        if addresses != self._told:
            self._told = addresses
            changed(tuple(Endpoint(address) for address in sorted(addresses)))

    async def _of_name(self, resolver: aiodns.DNSResolver, name: Address) -> _Answer:
        """Return the addresses of a name; of the first family that has any, unless all count."""
        found: set[str] = set()
        lives_s: float | None = None
        for family in _FAMILIES[self._settings.family]:
            try:
                result = await resolver.getaddrinfo(
                    name.host, family=family, port=name.port, type=SOCK_STREAM
                )
            except aiodns.error.DNSError as error:
                if error.args[0] not in _NOTHING:
                    raise
                continue
            for node in result.nodes[:ANSWERS_MAX]:
                found.add(str(Address(node.addr[0].decode(), name.port)))
                if node.ttl:
                    lives_s = min(node.ttl, lives_s or node.ttl)
            if found and self._settings.family != "all":
                break
        return _Answer(frozenset(found), lives_s)

    async def _of_srv(self, resolver: aiodns.DNSResolver, name: str) -> _Answer:
        """Return the addresses of the targets of the lowest priority number (RFC 2782)."""
        try:
            result = await resolver.query_dns(name, "SRV")
        except aiodns.error.DNSError as error:
            if error.args[0] not in _NOTHING:
                raise
            return _Answer(frozenset(), None)
        records = [
            (answer.data, answer.ttl)
            for answer in result.answer
            if isinstance(answer.data, pycares.SRVRecordData)
        ]
        lowest = min((record.priority for record, _ttl in records), default=0)
        targets = [r for r, _ttl in records if r.priority == lowest and r.target != "."]
        answers = [
            await self._of_name(resolver, Address(target.target.rstrip("."), target.port))
            for target in targets[:ANSWERS_MAX]
        ]
        lives = [answer.lives_s for answer in answers] + [ttl for _record, ttl in records]
        return _Answer(
            frozenset[str]().union(*(answer.addresses for answer in answers)),
            min((each for each in lives if each), default=None),
        )
