"""Pure. What is valid in a configuration and probably unintended: `check-config` warns of it.

Each line names the setting, what follows from it, and what to do.
"""

from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.sections import PRIORITY_MAX
from flowcontrol_server.config.engine import BandSection
from flowcontrol_server.config.requests import RequestRule
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.rules import BODY_NAMESPACE


def advice(settings: Settings) -> list[str]:
    """Return a line for each thing to look at; none for most configurations."""
    return [
        *_ports(settings),
        *_callers(settings),
        *_conformance(settings),
        *_load(settings),
        *_rules(settings),
        *_bands(settings.flow_control.bands),
        *_body_rules(settings.requests.rules),
    ]


def _ports(settings: Settings) -> Iterator[str]:
    listen = settings.listen
    is_authenticated = settings.tls.client_ca is not None or listen.secret_file is not None
    for name, address in (("extProc", listen.ext_proc), ("grpc", listen.grpc)):
        if isinstance(address, Address) and not _is_loopback(address) and not is_authenticated:
            yield (
                f"listen.{name} is open to other machines at {address} without authentication: "
                "any client can hold slots; set tls.clientCa or listen.secretFile, and let "
                "only Envoy and operators connect"
            )
    if not _is_loopback(listen.http):
        yield (
            f"listen.http is open to other machines at {listen.http} without TLS: an admin token "
            "sent there can be read on the way; let only Prometheus and operators connect"
        )


def _callers(settings: Settings) -> Iterator[str]:
    in_pod = settings.objectives.kubernetes is not None or settings.endpoints.kubernetes is not None
    if in_pod and settings.admin.trust_loopback:
        yield (
            "admin.trustLoopback is true in a pod: a sidecar that connects from 127.0.0.1 lets "
            "everybody ask without a token; set it to false"
        )


def _conformance(settings: Settings) -> Iterator[str]:
    if settings.requests.conformance:
        yield (
            "requests.conformance is true: any client chooses its model server by a header; leave "
            "it out but for conformance tests"
        )


def _body_rules(rules: Sequence[RequestRule]) -> Iterator[str]:
    """Say which rules a client can miss on purpose, to be treated as if they were not there.

    Envoy reads nothing of a body of another content type, of one that is too large, or of JSON it
    does not take: then no rule on the body matches. Nothing is gained by that only where a rule for
    everybody follows, to whom those on bodies give more.
    """
    objectives = [(i, r) for i, r in enumerate(rules) if r.objective or r.objective_from]
    flow_ids = [(i, r) for i, r in enumerate(rules) if r.flow_id or r.flow_id_from]
    for name, of_kind in (("objective", objectives), ("flowId", flow_ids)):
        on_bodies = [
            index
            for index, rule in of_kind
            if any(fact.namespace == BODY_NAMESPACE for fact in rule.facts())
        ]
        is_for_all = bool(of_kind) and not of_kind[-1][1].facts()
        if on_bodies and not is_for_all:
            yield (
                f"requests.rules[{on_bodies[0]}] reads the body, which a client can keep from "
                f"being read: end the rules with one for everybody that says {name}, without a "
                "match, and let those on bodies only raise above it"
            )


def _load(settings: Settings) -> Iterator[str]:
    if settings.scraping is None:
        yield (
            "load is not set: a model server that is down is noticed only by requests that fail "
            "there; set `load: {}`, or `load: {engine: ollama}` where there is no metrics page"
        )


def _rules(settings: Settings) -> Iterator[str]:
    for namespace in settings.requests.namespaces():
        yield (
            f"requests asks for metadata:{namespace}, which no filter of `envoy-config` provides: "
            "put the filter that does before ext_proc"
        )
    said = [False, False]
    for index, rule in enumerate(settings.requests.rules):
        says = [
            bool(rule.objective or rule.objective_from),
            bool(rule.flow_id or rule.flow_id_from),
        ]
        if all(done or not new for done, new in zip(said, says, strict=True)):
            yield (
                f"requests.rules[{index}] is never used: a rule before it always matches and says "
                "the same"
            )
        if not rule.match:
            fixed = [rule.objective is not None, rule.flow_id is not None]
            said = [done or new for done, new in zip(said, fixed, strict=True)]


def _bands(bands: Sequence[BandSection]) -> Iterator[str]:
    for index, band in enumerate(bands):
        free, top = _range(band)
        for low, high in sorted(map(_range, bands[:index])):
            if low <= free <= high:
                free = high + 1
        if free > top:
            yield (
                f"flowControl.bands[{index}] is never used: the first template that matches a band "
                "counts, and those before it match all of its priorities; put it before them"
            )


def _range(band: BandSection) -> tuple[int, int]:
    """Return the lowest and the highest priority that a template matches."""
    lowest, highest = band.match.min_priority, band.match.max_priority
    return (
        -PRIORITY_MAX - 1 if lowest is None else lowest,
        PRIORITY_MAX if highest is None else highest,
    )


def _is_loopback(address: Address) -> bool:
    if address.is_ip:
        return ip_address(address.host.partition("%")[0]).is_loopback
    return address.host == "localhost" or address.host.endswith(".localhost")
