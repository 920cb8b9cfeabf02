"""Pure. Warnings of `check-config` about settings that are valid but probably unintended.

Each line names the setting, its consequence, and what to do.
"""

from collections.abc import Iterator, Sequence

from flowcontrol_server.common.addresses import Address, is_loopback
from flowcontrol_server.common.sections import PRIORITY_MAX
from flowcontrol_server.config.engine import BandSection
from flowcontrol_server.config.requests import RequestRule
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.rules import BODY_NAMESPACE


def advice(settings: Settings) -> list[str]:
    """Return one line for each warning; most configurations have none."""
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
        if isinstance(address, Address) and not is_loopback(address.host) and not is_authenticated:
            yield (
                f"listen.{name} is open to other machines at {address} without authentication: "
                "any client can hold slots; set tls.clientCa or listen.secretFile, and let "
                "only Envoy and operators connect"
            )
    if not is_loopback(listen.http.host):
        yield (
            f"listen.http is open to other machines at {listen.http} without TLS: an admin token "
            "sent there can be read on the way; let only Prometheus and operators connect"
        )


def _callers(settings: Settings) -> Iterator[str]:
    in_pod = settings.objectives.kubernetes is not None or settings.endpoints.kubernetes is not None
    if in_pod and settings.admin.trust_loopback:
        yield (
            "admin.trustLoopback is true in a pod: a sidecar that connects from 127.0.0.1 lets "
            "anyone read without a token; set it to false"
        )


def _conformance(settings: Settings) -> Iterator[str]:
    if settings.requests.conformance:
        yield (
            "requests.conformance is true: any client can choose its model server with a header; "
            "set it only for conformance tests"
        )


def _body_rules(rules: Sequence[RequestRule]) -> Iterator[str]:
    """Warn of rules that a client can evade.

    Envoy does not read a body of another content type, one that is too large, or JSON that it
    cannot parse. Then no rule on the body matches. A client gains nothing by that only if the last
    rule is for everyone, and rules on bodies give more than that one.
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
                f"requests.rules[{on_bodies[0]}] needs the body, and a client can send a body that "
                f"is not read: end the rules with one without a match that sets {name} for "
                "everyone, and let rules on bodies only give more"
            )


def _load(settings: Settings) -> Iterator[str]:
    if settings.scraping is None:
        yield (
            "load is not set: a model server that is down is detected only by requests that fail "
            "there; set `load: {}`, or `load: {engine: ollama}` if there is no metrics page"
        )


def _rules(settings: Settings) -> Iterator[str]:
    for namespace in settings.requests.namespaces():
        yield (
            f"requests uses metadata:{namespace}, which no filter of `envoy-config` sets: "
            "put a filter that sets it before ext_proc"
        )
    are_set = [False, False]
    for index, rule in enumerate(settings.requests.rules):
        sets = [
            bool(rule.objective or rule.objective_from),
            bool(rule.flow_id or rule.flow_id_from),
        ]
        if all(done or not new for done, new in zip(are_set, sets, strict=True)):
            yield (
                f"requests.rules[{index}] is never used: a rule before it always matches and sets "
                "the same"
            )
        if not rule.match:
            fixed = [rule.objective is not None, rule.flow_id is not None]
            are_set = [done or new for done, new in zip(are_set, fixed, strict=True)]


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
