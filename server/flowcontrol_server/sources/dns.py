"""Endpoints by DNS: the addresses of names, and the targets of SRV records, queried repeatedly.

c-ares rather than getaddrinfo: that would take a thread for every query, knows no SRV records and
does not report the time to live. c-ares reads the system's configuration and hosts file all the
same.

No such name, or no such record, is an answer: nothing is there (a headless Kubernetes service
answers so when it has no ready pod). Any other failure is not: the last answer stays in force, for
each name and address family by itself.
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

from flowcontrol.events import Endpoint
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.sources import Dns
from flowcontrol_server.sources.backoff import Backoff

TIMEOUT_S = 2.0
TRIES = 2
SOONEST_S = 1.0
"""However short an answer lives, also with a TTL of 0, it is not asked for again sooner."""
ANSWERS_MAX = 10_000
"""Endpoints that one question may bring."""
ANSWER_S = 60.0
"""How long one question may take, with the addresses of all its targets."""
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


_Families = dict[tuple[str, int], frozenset[str]]
"""The last answer by host:port and address family."""


class _Answer(NamedTuple):
    addresses: frozenset[str]
    """host:port"""
    ttl_s: float | None
    """How long the answer may be kept; None: not stated."""
    problems: tuple[str, ...] = ()
    """What could not be had, where the rest counts all the same."""


_Question = Callable[[aiodns.DNSResolver, _Families, _Families], Awaitable[_Answer]]
"""Asks; takes the last answers by family, and where to note the new ones."""


@final
class DnsEndpoints:
    """Resolves names to endpoints. Owner: the loop.

    Args:
        settings: which name to resolve, at which servers and how often.
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
        """Report the endpoints whenever they change, until cancelled.

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
        families: _Families = {}
        while True:
            # A new one for every question, at 0.1 ms: each reads the system's configuration again,
            # and none has a cache, which would keep an answer as long as it lives.
            resolver = aiodns.DNSResolver(self._servers, timeout=TIMEOUT_S, tries=TRIES)
            found: _Families = {}
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await ask(resolver, families, found)
            except (aiodns.error.DNSError, TimeoutError) as error:
                self._note(name, _reason(error))
                wait_s = backoff.next_s()
            else:
                families = found
                self._note(name, "; ".join(answer.problems))
                self._known[name] = answer.addresses
                ttl_s = interval_s if answer.ttl_s is None else answer.ttl_s
                wait_s = min(interval_s, max(ttl_s, SOONEST_S))
                if answer.problems:
                    wait_s = min(wait_s, backoff.next_s())
                else:
                    backoff.reset()
            finally:
                await resolver.close()
            self._asked.add(name)
            if len(self._asked) == question_count and self._known:
                self._tell(changed)
            await asyncio.sleep(wait_s)

    def _note(self, name: str, problem: str) -> None:
        """Take what is wrong with a name, or that nothing is; log when that begins and ends."""
        if problem:
            self.error_count += 1
            if name not in self.problems:
                _log.warning("name_not_resolved", name=name, problem=problem)
            self.problems[name] = problem
        elif self.problems.pop(name, None) is not None:
            _log.info("name_resolved_again", name=name)

    def _tell(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        addresses = frozenset[str]().union(*self._known.values())
        if addresses != self._told:
            self._told = addresses
            changed(tuple(Endpoint(address) for address in sorted(addresses)))

    async def _of_name(
        self, resolver: aiodns.DNSResolver, known: _Families, found: _Families, *, name: Address
    ) -> _Answer:
        """Return the addresses of a name; of the first family that has any, unless all count.

        Where one family cannot be had, its last answer counts.

        Raises:
            DNSError: a family cannot be had, and nothing is known.
        """
        addresses: set[str] = set()
        ttls: list[float] = []
        failure: aiodns.error.DNSError | None = None
        for family in _FAMILIES[self._settings.family]:
            key = str(name), family
            try:
                result = await resolver.getaddrinfo(
                    name.host, family=family, port=name.port, type=SOCK_STREAM
                )
            except aiodns.error.DNSError as error:
                if error.args[0] in _NOTHING:
                    continue
                failure = error
                found[key] = known.get(key, frozenset())
            else:
                nodes = result.nodes[:ANSWERS_MAX]
                found[key] = frozenset(str(Address(n.addr[0].decode(), name.port)) for n in nodes)
                ttls += [node.ttl for node in nodes]
            addresses |= found[key]
            if addresses and self._settings.family != "all":
                break
        if failure is not None and not addresses:
            raise failure
        problems = () if failure is None else (f"{name.host}: {_reason(failure)}",)
        return _Answer(frozenset(addresses), min(ttls, default=None), problems)

    async def _of_srv(
        self, resolver: aiodns.DNSResolver, known: _Families, found: _Families, *, name: str
    ) -> _Answer:
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
        targets = [r for r, _ttl in records if r.priority == lowest and r.target.strip(".")]
        problems = [f"{r.target} has port 0" for r in targets if r.port == 0]
        addresses: set[str] = set()
        ttls: list[float] = [ttl for _record, ttl in records]
        for target in (each for each in targets if each.port):
            address = Address(target.target.rstrip("."), target.port)
            answer = await self._of_name(resolver, known, found, name=address)
            addresses |= answer.addresses
            problems += answer.problems
            ttls += [] if answer.ttl_s is None else [answer.ttl_s]
            if len(addresses) >= ANSWERS_MAX:
                break
        return _Answer(frozenset(addresses), min(ttls, default=None), tuple(problems))


def _reason(error: Exception) -> str:
    return str(error.args[-1]) if error.args else f"took more than {ANSWER_S:g} s"
