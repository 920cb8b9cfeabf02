"""Endpoints by DNS, from a name server over real UDP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from flowcontrol.events import Endpoint
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.sources import Dns
from flowcontrol_server.sources import dns
from flowcontrol_server.sources.dns import DnsEndpoints
from tests.support.dns_server import AAAA, SERVFAIL, SRV, A, FakeDns, name_server
from tests.support.told import Told, eventually, following

NAME = "vllm.test"
SERVICE = "_http._tcp.vllm.test"
Endpoints = tuple[Endpoint, ...]
Served = tuple[FakeDns, Address]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are asked for often, and nobody waits long."""
    monkeypatch.setattr(dns, "SOONEST_S", 0.02)
    monkeypatch.setattr(dns, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(dns, "TRIES", 1)


@pytest.fixture(name="served")
async def _served() -> AsyncIterator[Served]:
    """A name server, and where it is."""
    async with name_server() as served:
        yield served


@asynccontextmanager
async def resolving(
    server: Address, **settings: Any
) -> AsyncIterator[tuple[DnsEndpoints, Told[Endpoints]]]:
    """Endpoints by DNS, followed."""
    asked = {"interval": "20ms", "servers": [str(server)], **settings}
    source = DnsEndpoints(Dns(**asked))
    told: Told[Endpoints] = Told()
    async with following(source, told):
        yield source, told


def at(*addresses: str) -> Endpoints:
    """Endpoints."""
    return tuple(Endpoint(address) for address in addresses)


class TestNames:
    """A and AAAA records."""

    async def test_addresses_come_and_go(self, served: Served) -> None:
        """Every address of a name is an endpoint, for as long as it is one."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5"])
        async with resolving(server, names=[f"{NAME}:8000"]) as (source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            fake.address(NAME, ["10.0.0.7", "10.0.0.6"])
            await told.until_equal(at("10.0.0.6:8000", "10.0.0.7:8000"))

            assert len(told.news) == 2
            assert source.error_count == 0

    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("prefer-ipv4", at("10.0.0.5:8000")),
            ("ipv4", at("10.0.0.5:8000")),
            ("ipv6", at("[fd00::5]:8000")),
            ("all", at("10.0.0.5:8000", "[fd00::5]:8000")),
        ],
    )
    async def test_families(self, served: Served, family: str, expected: Endpoints) -> None:
        """A server with two addresses counts once, unless that is wanted."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5", "fd00::5"])
        async with resolving(server, names=[f"{NAME}:8000"], family=family) as (_source, told):
            await told.until_equal(expected)

    async def test_only_ipv6(self, served: Served) -> None:
        """Where there is no IPv4 address the IPv6 address counts."""
        fake, server = served
        fake.address(NAME, ["fd00::5"])
        async with resolving(server, names=[f"{NAME}:8000"]) as (_source, told):
            await told.until_equal(at("[fd00::5]:8000"))

    async def test_several_names(self, served: Served) -> None:
        """Names add up; an address that two of them share counts once."""
        fake, server = served
        fake.address("a.test", ["10.0.0.5", "10.0.0.6"])
        fake.address("b.test", ["10.0.0.6"])
        names = ["a.test:8000", "b.test:8000", "b.test:9000"]
        async with resolving(server, names=names) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000", "10.0.0.6:9000"))

            assert len(told.news) == 1, "half of it is never told"

    async def test_the_hosts_file(self, served: Served) -> None:
        """Names that only the system knows are known, too."""
        async with resolving(served[1], names=["localhost:8000"]) as (_source, told):
            await told.until_equal(at("127.0.0.1:8000"))


class TestSrv:
    """SRV records."""

    async def test_targets(self, served: Served) -> None:
        """The targets of the lowest priority number are endpoints, each at its port."""
        fake, server = served
        fake.service(SERVICE, [(10, "a.test", 8000), (10, "b.test", 8001), (20, "c.test", 8002)])
        fake.address("a.test", ["10.0.0.5"])
        fake.address("b.test", ["10.0.0.6"])
        fake.address("c.test", ["10.0.0.7"])
        async with resolving(server, srv=[SERVICE]) as (_source, told):
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8001"))
            fake.service(SERVICE, [(20, "c.test", 8002)])
            await told.until_equal(at("10.0.0.7:8002"))

            assert ("c.test", A) in fake.asked
            assert (SERVICE, SRV) in fake.asked

    async def test_no_service(self, served: Served) -> None:
        """A target that is the root says that there is none (RFC 2782)."""
        fake, server = served
        fake.service(SERVICE, [(0, ".", 0)])
        async with resolving(server, srv=[SERVICE]) as (source, told):
            await told.until_equal(())

            assert source.error_count == 0

    async def test_a_target_out_of_reach(self, served: Served) -> None:
        """When one target cannot be resolved, what was known stays: half would be too little."""
        fake, server = served
        fake.service(SERVICE, [(0, "a.test", 8000), (0, "b.test", 8000)])
        fake.address("a.test", ["10.0.0.5"])
        fake.address("b.test", ["10.0.0.6"])
        async with resolving(server, srv=[SERVICE]) as (source, told):
            await told.until_equal(at("10.0.0.5:8000", "10.0.0.6:8000"))
            fake.codes["b.test"] = SERVFAIL
            await eventually(lambda: source.error_count >= 2)

            assert len(told.news) == 1

    async def test_port_0(self, served: Served) -> None:
        """A target with port 0 is no endpoint, and is shown as a problem."""
        fake, server = served
        fake.service(SERVICE, [(0, "a.test", 0), (0, "b.test", 8000)])
        fake.address("a.test", ["10.0.0.5"])
        fake.address("b.test", ["10.0.0.6"])
        async with resolving(server, srv=[SERVICE]) as (source, told):
            await told.until_equal(at("10.0.0.6:8000"))

            assert source.problems == {SERVICE: "a.test has port 0"}


class TestOutages:
    """What is no answer."""

    @pytest.mark.parametrize("kind", [A, AAAA])
    async def test_one_family_fails(self, served: Served, kind: int) -> None:
        """The other family counts, and of the failing one what it answered last."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5", "fd00::5"])
        async with resolving(server, names=[f"{NAME}:1"], family="all") as (source, told):
            await told.until_equal(at("10.0.0.5:1", "[fd00::5]:1"))
            fake.codes[NAME, kind] = SERVFAIL
            await eventually(lambda: source.problems)
            fake.address(NAME, ["10.0.0.6", "fd00::6"])
            v4, v6 = ("5", "6") if kind == A else ("6", "5")
            await told.until_equal(at(f"10.0.0.{v4}:1", f"[fd00::{v6}]:1"))
            fake.codes.clear()
            await told.until_equal(at("10.0.0.6:1", "[fd00::6]:1"))

            assert source.problems == {}

    async def test_one_family_fails_from_the_start(self, served: Served) -> None:
        """Where the preferred family has never answered, the other one counts."""
        fake, server = served
        fake.address(NAME, ["fd00::5"])
        fake.codes[NAME, A] = SERVFAIL
        async with resolving(server, names=[f"{NAME}:1"]) as (source, told):
            await told.until_equal(at("[fd00::5]:1"))

            assert list(source.problems) == [f"{NAME}:1"]

    @pytest.mark.parametrize("code", [SERVFAIL, None], ids=["failure", "silence"])
    async def test_what_was_known_stays(self, served: Served, code: int | None) -> None:
        """A failure is no answer, silence neither; said once, and once when it is over."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5"])
        with capture_logs() as lines:
            async with resolving(server, names=[f"{NAME}:8000"]) as (source, told):
                await told.until_equal(at("10.0.0.5:8000"))
                fake.codes[NAME] = code
                await eventually(lambda: source.error_count >= 3)
                assert list(source.problems) == [f"{NAME}:8000"]
                fake.address(NAME, ["10.0.0.6"])
                del fake.codes[NAME]
                await told.until_equal(at("10.0.0.6:8000"))

                assert source.problems == {}
        events = [line["event"] for line in lines]
        assert events == ["name_not_resolved", "name_resolved_again"]

    async def test_no_such_name_is_an_answer(self, served: Served) -> None:
        """A name that is gone has no endpoints: a headless service without a ready pod."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5"])
        async with resolving(server, names=[f"{NAME}:8000"]) as (source, told):
            await told.until_equal(at("10.0.0.5:8000"))
            fake.forget(NAME)
            await told.until_equal(())
            fake.address(NAME, [])
            fake.records[NAME, 16] = [b"\x01x"]  # it exists, but has no address
            fake.address(NAME, ["10.0.0.6"])
            await told.until_equal(at("10.0.0.6:8000"))

            assert source.error_count == 0

    async def test_one_of_two_names(self, served: Served) -> None:
        """At the start, a name that answers is told although another does not."""
        fake, server = served
        fake.address("a.test", ["10.0.0.5"])
        fake.codes["b.test"] = SERVFAIL
        async with resolving(server, names=["a.test:1", "b.test:2"]) as (_source, told):
            await told.until_equal(at("10.0.0.5:1"))
            fake.address("b.test", ["10.0.0.6"])
            del fake.codes["b.test"]
            await told.until_equal(at("10.0.0.5:1", "10.0.0.6:2"))

    async def test_a_question_that_takes_too_long(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Targets are asked for one by one, but the answer is due within a time for all."""
        monkeypatch.setattr(dns, "ANSWER_S", 0.05)
        monkeypatch.setattr(dns, "TIMEOUT_S", 60.0)
        fake, server = served
        fake.service(SERVICE, [(0, "a.test", 8000)])
        fake.codes["a.test"] = None
        async with resolving(server, srv=[SERVICE]) as (source, told):
            await eventually(lambda: SERVICE in source.problems)

            assert source.problems[SERVICE] == "took more than 0.05 s"
            assert told.news == []

    async def test_too_many_addresses(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The targets of a service bring at most so many endpoints."""
        monkeypatch.setattr(dns, "ANSWERS_MAX", 2)
        fake, server = served
        fake.service(SERVICE, [(0, f"{name}.test", 8000) for name in "abc"])
        for number, name in enumerate("abc"):
            fake.address(f"{name}.test", [f"10.0.0.{number}"])
        async with resolving(server, srv=[SERVICE]) as (_source, told):
            await eventually(lambda: told.news)

            assert len(told.news[0]) == 2

    async def test_no_answer_at_all(self, served: Served) -> None:
        """As long as no name has answered, nothing is told: unknown is not empty."""
        fake, server = served
        fake.codes[NAME] = SERVFAIL
        async with resolving(server, names=[f"{NAME}:8000"]) as (source, told):
            await eventually(lambda: source.error_count >= 3)

            assert told.news == []


class TestPace:
    """How often is asked."""

    async def test_time_to_live(self, served: Served) -> None:
        """An answer is kept for as long as it lives, at most for the interval."""
        fake, server = served
        fake.address(NAME, ["10.0.0.5"])
        fake.ttl_s = 3600
        async with resolving(server, names=[f"{NAME}:1"], interval="30ms"):
            await eventually(lambda: fake.asked.count((NAME, A)) >= 3)
        fake.asked.clear()
        async with resolving(server, names=[f"{NAME}:1"], interval="1h") as (_source, told):
            await told.until_equal(at("10.0.0.5:1"))
            assert fake.asked.count((NAME, A)) == 1
        for ttl_s in (1, 0):
            fake.ttl_s = ttl_s
            fake.asked.clear()
            async with resolving(server, names=[f"{NAME}:1"], interval="1h"):
                await eventually(lambda: fake.asked.count((NAME, A)) >= 2)

        assert (NAME, AAAA) not in fake.asked
