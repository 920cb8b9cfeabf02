"""Endpoints by DNS: the addresses of names, and the targets of SRV records, queried repeatedly.

Queries use c-ares. getaddrinfo would take a thread for every query, has no SRV records and does not
report the time to live. c-ares, too, reads the system's configuration and hosts file.

"No such name" and "no such record" are answers: there are no endpoints (a headless Kubernetes
service answers so when it has no ready pod). Any other failure is not an answer, and the last
answer stays in effect, for each name and address family separately.
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
from flowcontrol_server.common.backoff import Backoff
from flowcontrol_server.config.sources import Dns

TIMEOUT_S = 2.0
TRIES = 2
SOONEST_S = 1.0
"""Least time between two queries for a name, even if the TTL is shorter or 0."""
ANSWERS_MAX = 10_000
"""Most endpoints that one name may resolve to."""
ANSWER_S = 60.0
"""Timeout for one name, including the addresses of all its SRV targets."""
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
"""The last answer, by host:port and address family."""


class _Answer(NamedTuple):
    addresses: frozenset[str]
    """host:port"""
    ttl_s: float | None
    """Time to live of the answer; None: not stated."""
    problems: tuple[str, ...] = ()
    """Queries that failed; the other addresses are used nevertheless."""


_Question = Callable[[aiodns.DNSResolver, _Families, _Families], Awaitable[_Answer]]
"""Queries a name; takes the last answers by family, and where to put the new ones."""


@final
class DnsEndpoints:
    """Resolves names to endpoints. Owner: the loop.

    Args:
        settings: the names to resolve, the servers to query and how often.
    """

    def __init__(self, settings: Dns) -> None:
        self.error_count = 0
        """Failed queries since the start."""
        self.problems: dict[str, str] = {}
        """Failures of the latest query, by name."""
        self._settings = settings
        self._servers = [str(address) for address in settings.servers] or None
        self._known: dict[str, frozenset[str]] = {}
        self._queried: set[str] = set()
        self._reported: frozenset[str] | None = None
        self._chance = random.Random()  # noqa: S311 - spreads questions, keeps no secret

    async def follow(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Report the endpoints whenever they change, until cancelled.

        The first report comes once every name has been queried and at least one has an answer.
        """
        questions: dict[str, _Question] = {
            str(name): partial(self._of_name, name=name) for name in self._settings.names
        }
        questions |= {name: partial(self._of_srv, name=name) for name in self._settings.srv}
        async with asyncio.TaskGroup() as group:
            for name, ask in questions.items():
                group.create_task(self._keep_querying(name, ask, len(questions), changed))

    async def _keep_querying(
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
            # A new resolver for every query, at 0.1 ms: it reads the system's configuration again,
            # and has no cache, which would keep an answer for its whole time to live.
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
            self._queried.add(name)
            if len(self._queried) == question_count and self._known:
                self._report(changed)
            await asyncio.sleep(wait_s)

    def _note(self, name: str, problem: str) -> None:
        """Record the failure of a name, empty: none; log when failures begin and end."""
        if problem:
            self.error_count += 1
            if name not in self.problems:
                _log.warning("name_not_resolved", name=name, problem=problem)
            self.problems[name] = problem
        elif self.problems.pop(name, None) is not None:
            _log.info("name_resolved_again", name=name)

    def _report(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        addresses = frozenset[str]().union(*self._known.values())
        if addresses != self._reported:
            self._reported = addresses
            changed(tuple(Endpoint(address) for address in sorted(addresses)))

    async def _of_name(
        self, resolver: aiodns.DNSResolver, known: _Families, found: _Families, *, name: Address
    ) -> _Answer:
        """Return the addresses of a name, of the first family that has any unless all are wanted.

        If the query for a family fails, its last answer is used.

        Raises:
            DNSError: the query for a family failed, and no address is known.
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
        """Return the addresses of the targets with the lowest priority number (RFC 2782)."""
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
