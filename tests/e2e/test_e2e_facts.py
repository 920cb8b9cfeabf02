"""What is known of a request, whom it is believed, and what the model server and client see of it.

Envoy reads the body; the service is told a few of its fields. Rules turn trusted facts into an
objective and a flow id; what a client says of itself counts only where the operator lets it.
"""

import json
from typing import Any

import pytest

from tests.e2e.client import fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway, unique
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

JSON = {"content-type": "application/json"}
CLAIMS = "envoy.filters.http.jwt_authn"
RULES = [
    {"match": {"body:service_tier": "flex"}, "objective": "batch"},
    {
        "match": {f"metadata:{CLAIMS}:claims:plan": "gold", "body:model": "llama-*"},
        "objective": "chat",
    },
    {"flowIdFrom": f"metadata:{CLAIMS}:claims:org"},
    {"flowIdFrom": "body:user"},
    {"match": {"body:stream": True}, "flowId": "streams"},
]
SLO = "x-llm-d-slo-ttft-ms"
DURATION, HEADROOM = "x-llm-d-flow-queue-duration-ms", "x-llm-d-flow-headroom"
POSITION = "x-llm-d-flow-position"


def verify_claims(configuration: dict[str, Any]) -> None:
    """Put a filter before ext_proc that finds, in the header x-claims, what a JWT would hold."""
    code = f"""
function envoy_on_request(handle)
  local plan, org = handle:headers():get("x-plan"), handle:headers():get("x-org")
  if plan or org then
    handle:streamInfo():dynamicMetadata():set("{CLAIMS}", "claims", {{plan = plan, org = org}})
  end
end
"""
    lua = {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": code},
        },
    }
    (chain,) = configuration["static_resources"]["listeners"][0]["filter_chains"]
    chain["filters"][0]["typed_config"]["http_filters"].insert(0, lua)


@pytest.fixture(scope="module")
def spec() -> Spec:
    """Rules on bodies and claims; a client's own words count after them."""
    return Spec(
        max_concurrency=2,
        requests={
            "rules": RULES,
            "enginePriority": "vllm",
            "responseHeaders": ["queue-duration", "position", "headroom"],
        },
        edit_envoy=verify_claims,
    )


async def fate(
    gateway: Gateway, body: object, *, headers: dict[str, str] | None = None, **request: Any
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Send a request and answer it; return its canonical line, and what server and client saw."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    caller = await gateway.call(headers=JSON | (headers or {}), body=data, **request)
    call = await gateway.next_call()
    await call.respond()
    reply = await caller.reply()
    assert call.body == data
    return await gateway.decided(call.name), dict(call.headers), dict(reply.headers)


class TestRules:
    """Objective and flow id from trusted facts."""

    @pytest.mark.parametrize(
        ("body", "headers", "priority", "flow_id"),
        [
            ({}, {}, 0, "default-flow"),
            ({"service_tier": "flex"}, {}, -1, "default-flow"),
            ({"service_tier": "default"}, {}, 0, "default-flow"),
            ({"service_tier": "flex", "model": "llama-8b"}, {"x-plan": "gold"}, -1, "default-flow"),
            ({"model": "llama-8b"}, {"x-plan": "gold", "x-org": "acme"}, 10, "acme"),
            ({"model": "llama-8b"}, {"x-plan": "free", "x-org": "acme"}, 0, "acme"),
            ({"model": "qwen"}, {"x-plan": "gold"}, 0, "default-flow"),
            ({"user": "bob", "stream": True}, {}, 0, "bob"),
            ({"user": 17}, {}, 0, "17"),
            ({"stream": True}, {}, 0, "streams"),
            ({"stream": False}, {}, 0, "default-flow"),
            (b"{no json", {}, 0, "default-flow"),
            ([{"user": "bob"}], {}, 0, "default-flow"),
            ({"user": {"name": "bob"}}, {}, 0, "default-flow"),
        ],
    )
    async def test_first_match_wins(
        self,
        gateway: Gateway,
        body: object,
        headers: dict[str, str],
        priority: int,
        flow_id: str,
    ) -> None:
        """Each of both is taken from the first rule that matches and says it."""
        line, _, _ = await fate(gateway, body, headers=headers)

        assert (line["priority"], line["flow_id"]) == (priority, flow_id)

    async def test_rule_before_header(self, gateway: Gateway) -> None:
        """What the operator made of trusted facts, no header of the client's overrules."""
        headers = {"x-org": "acme"}
        body = {"service_tier": "flex"}
        line, _, _ = await fate(
            gateway, body, headers=headers, objective="chat", flow_id="somebody-else"
        )

        assert (line["priority"], line["flow_id"]) == (-1, "acme")

    async def test_header_where_no_rule_speaks(self, gateway: Gateway) -> None:
        """Where no rule speaks the header counts, unless the operator says otherwise."""
        line, _, _ = await fate(gateway, {}, objective="chat", flow_id="tenant")

        assert (line["priority"], line["flow_id"]) == (10, "tenant")

    @pytest.mark.parametrize("name", ["日本", "naïve"])
    async def test_one_tenant(self, gateway: Gateway, name: str) -> None:
        """A tenant named in a header is the one that a body names."""
        header = {"x-llm-d-inference-fairness-id": name.encode().decode("latin-1")}
        by_header, _, _ = await fate(gateway, {}, headers=header)
        by_body, _, _ = await fate(gateway, {"user": name})

        assert by_header["flow_id"] == by_body["flow_id"] == name

    async def test_bytes_that_are_not_utf_8(self, gateway: Gateway) -> None:
        """In a claim or in x-request-id, both of which Envoy passes on as text, they do no harm."""
        caller = await gateway.call(name=f"{unique()}\xff", headers={"x-org": "acme\xff"})
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()

        assert (await gateway.decided(call.name))["flow_id"] == "acme\xff"

    @pytest.mark.parametrize(
        "body",
        [
            '{"service_tier":"flex","seed":18446744073709551615}',
            '{"service_tier":"flex","x":NaN}',
            '{"service_tier":"flex","x":' + "[" * 3000 + "]" * 3000 + "}",
        ],
        ids=["long-integer", "nan", "nested"],
    )
    async def test_unread_body(self, gateway: Gateway, body: str) -> None:
        """A body that Envoy cannot parse matches no rule, passes, and is counted."""

        async def count() -> float:
            page = (await fetch(gateway.stack.http, "/metrics")).body.decode()
            (line,) = (x for x in page.splitlines() if x.startswith("flowcontrol_unread_bodies_t"))
            return float(line.split()[1])

        before = await count()
        caller = await gateway.call(body=body.encode(), headers=JSON)
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()
        line = await gateway.decided(call.name)

        assert line["priority"] == 0
        assert await count() == before + 1

    async def test_byte_order_mark(self, gateway: Gateway) -> None:
        """Envoy 1.40 reads what is behind one: the rule matches."""
        caller = await gateway.call(body='\ufeff{"service_tier":"flex"}'.encode(), headers=JSON)
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()

        assert (await gateway.decided(call.name))["priority"] == -1

    async def test_charset(self, gateway: Gateway) -> None:
        """A charset beside the media type hides no body from the rules."""
        headers = {"content-type": "application/json; charset=utf-8"}
        line, _, _ = await fate(gateway, {"user": "bob", "model": "m"}, headers=headers)

        assert (line["flow_id"], line["model"]) == ("bob", "m")

    async def test_forged_claim(self, gateway: Gateway) -> None:
        """A header that looks like metadata is none."""
        line, _, _ = await fate(gateway, {"model": "llama"}, headers={CLAIMS: '{"plan": "gold"}'})

        assert line["priority"] == 0


class TestServerAndClient:
    """What the two ends see."""

    async def test_control_headers_are_removed(self, gateway: Gateway) -> None:
        """What was meant for us, the model server does not see."""
        headers = {SLO: "500", "x-slo-ttft-ms": "500", "x-llm-d-inference-ttl": "9s"}
        _, seen, _ = await fate(gateway, {}, headers=headers, objective="chat", flow_id="tenant")

        assert [name for name in seen if name.startswith(("x-llm-d", "x-gateway", "x-slo"))] == []

    async def test_engine_priority(self, gateway: Gateway) -> None:
        """The model server is told the band, in its own sense; a client's word is replaced."""
        _, seen, _ = await fate(gateway, {}, headers={"x-vllm-priority": "-99"}, objective="chat")

        assert seen["x-vllm-priority"] == "-10"

    async def test_engine_priority_on_an_exempt_path(self, gateway: Gateway) -> None:
        """Where nothing is decided the client's word is taken off."""
        await gateway.call(
            "/v1/models", method="GET", body=None, headers={"x-vllm-priority": "-99"}
        )
        call = await gateway.next_call()
        await call.respond()

        assert "x-vllm-priority" not in call.headers

    async def test_response_headers(self, gateway: Gateway) -> None:
        """The client is told how long it was held, behind how many, and how full the pool is."""
        holders = [await gateway.call() for _ in range(2)]
        calls = [await gateway.next_call() for _ in range(2)]
        caller = await gateway.call(headers=JSON)
        await gateway.until(waiting=1)
        behind = await gateway.call(headers=JSON)
        await gateway.until(waiting=2)
        await calls[0].respond()
        call = await gateway.next_call()
        await call.respond()
        reply = await caller.reply()
        await (await gateway.next_call()).respond()
        reply_behind = await behind.reply()
        await calls[1].respond()
        for holder in holders:
            await holder.reply()
        line = await gateway.decided(call.name)

        assert int(reply.headers[DURATION]) == int(line["waited_ms"])
        assert float(reply.headers[HEADROOM]) == 0
        assert [each.headers[POSITION] for each in (reply, reply_behind)] == ["0", "1"]

    async def test_first_response_has_room(self, gateway: Gateway) -> None:
        """With one of two slots taken, half of the pool is free."""
        _, _, headers = await fate(gateway, {})

        assert float(headers[HEADROOM]) == 0.5

    async def test_no_response_headers_elsewhere(self, gateway: Gateway) -> None:
        """A response that we were not asked about has none of them."""
        caller = await gateway.call("/v1/models", method="GET", body=None)
        await (await gateway.next_call()).respond()
        reply = await caller.reply()

        assert DURATION not in reply.headers
        assert HEADROOM not in reply.headers


class TestBodies:
    """Envoy holds a JSON body to read it."""

    async def test_large_prompt(self, start: Start) -> None:
        """A prompt of megabytes is read where it is to be, and arrives whole."""
        gateway = await start(Spec(requests={"readBodiesUpTo": "unlimited"}))
        line, _, _ = await fate(gateway, {"prompt": "x" * 4_000_000, "model": "large"})

        assert line["model"] == "large"
        assert line["byte_size"] > 4_000_000

    async def test_too_large(self, gateway: Gateway) -> None:
        """A JSON body beyond Envoy's buffer is refused before it waits."""
        body = json.dumps({"prompt": "x" * 33 * 2**20}).encode()
        caller = await gateway.call(headers=JSON, body=body)

        assert (await caller.reply()).status == 413


class TestSmallBodiesAlone:
    """requests.readBodiesUpTo."""

    async def test_by_default(self, start: Start) -> None:
        """A body of more than 64 KiB passes as it is."""
        gateway = await start(Spec())
        small, _, _ = await fate(gateway, {"model": "m", "prompt": "x" * 60_000})
        large, _, _ = await fate(gateway, {"model": "m", "prompt": "x" * 70_000})

        assert (small["model"], large["model"]) == ("m", "")
        assert large["byte_size"] > 70_000

    async def test_large_body_is_not_read(self, start: Start) -> None:
        """Beyond the size nothing is known of a body, and it passes; of others all is."""
        gateway = await start(Spec(requests={"readBodiesUpTo": 1000}))
        small, _, _ = await fate(gateway, {"model": "m", "prompt": "x" * 900})
        large, _, _ = await fate(gateway, {"model": "m", "prompt": "x" * 1000})

        assert (small["model"], large["model"]) == ("m", "")
        assert small["byte_size"] < 1000 < large["byte_size"]


class TestDistrust:
    """requests.trustHeaders: false."""

    async def test_client_cannot_promote_itself(self, start: Start) -> None:
        """Objective and flow id of the client's count for nothing; the rules' do."""
        rules = [{"match": {"header:x-plan": "gold"}, "objective": "chat"}]
        gateway = await start(Spec(requests={"trustHeaders": False, "rules": rules}))
        plain, seen, _ = await fate(gateway, {}, objective="chat", flow_id="another")
        gold, _, _ = await fate(gateway, {}, headers={"x-plan": "gold"}, objective="batch")

        assert (plain["priority"], plain["flow_id"]) == (0, "default-flow")
        assert gold["priority"] == 10
        assert "x-llm-d-inference-objective" not in seen
