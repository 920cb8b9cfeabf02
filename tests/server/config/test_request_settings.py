"""What the settings of requests mean to those who read and answer them."""

from typing import Any

import pytest
import yaml

from flowcontrol_server.config.requests import Requests, Settlement
from flowcontrol_server.requests.rules import BODY_NAMESPACE, Condition, Fact, Rule

CLAIMS = "envoy.filters.http.jwt_authn"
RULES = """
rules:
  - match: {body:service_tier: flex}
    objective: batch
  - match:
      metadata:envoy.filters.http.jwt_authn:claims:plan: gold-*
      body:stream: true
      header:X-Level: 3
    objectiveFrom: header:x-wanted
    flowIdFrom: metadata:envoy.filters.http.jwt_authn:claims:org
  - flowId: everybody
"""


def requests(text: str = "{}") -> Requests:
    """The section, as one writes it."""
    content: dict[str, Any] = yaml.safe_load(text)
    return Requests.model_validate(content)


class TestIntake:
    """How requests are read."""

    def test_defaults(self) -> None:
        """Headers are trusted, and there are no rules."""
        intake = requests().intake()

        assert intake.trusts_headers
        assert intake.rules == ()
        assert intake.input_tokens is None
        assert intake.exempt.passes("GET", "/v1/models")
        assert not intake.exempt.passes("POST", "/v1/models/llama:predict")

    def test_rules(self) -> None:
        """Names become facts, and what is no text is written as one."""
        tier = Fact(namespace=BODY_NAMESPACE, path=("service_tier",))
        plan = Fact(namespace=CLAIMS, path=("claims", "plan"))
        stream = Fact(namespace=BODY_NAMESPACE, path=("stream",))
        level = Fact(header="x-level")
        expected = (
            Rule(match=(Condition(tier, "flex"),), objective="batch"),
            Rule(
                match=(
                    Condition(plan, "gold-*"),
                    Condition(stream, "true"),
                    Condition(level, "3"),
                ),
                objective=Fact(header="x-wanted"),
                flow_id=Fact(namespace=CLAIMS, path=("claims", "org")),
            ),
            Rule(flow_id="everybody"),
        )

        assert expected == requests(RULES).intake().rules

    def test_written_as_read(self) -> None:
        """Facts are written by the names they were read by."""
        dumped = requests(RULES).model_dump(by_alias=True)["rules"]

        assert list(dumped[0]["match"]) == ["body:service_tier"]
        assert list(dumped[1]["match"])[2] == "header:x-level"
        assert dumped[1]["flowIdFrom"] == f"metadata:{CLAIMS}:claims:org"

    def test_the_rest(self) -> None:
        """Trust, and who counts the tokens of the prompt."""
        intake = requests("{trustHeaders: false, inputTokensFrom: header:X-Tokens}").intake()

        assert not intake.trusts_headers
        assert intake.input_tokens == Fact(header="x-tokens")


class TestEnvoy:
    """What Envoy has to do for it."""

    def test_namespaces(self) -> None:
        """Metadata that a rule asks for must be forwarded, each once."""
        assert requests(RULES).namespaces() == [CLAIMS]
        assert requests("{inputTokensFrom: metadata:counter:tokens}").namespaces() == ["counter"]
        assert requests().namespaces() == []
        assert requests("{readBodies: false, rules: [{flowIdFrom: header:x}]}").namespaces() == []

    @pytest.mark.parametrize(
        ("text", "header"),
        [
            ("{}", None),
            ("{enginePriority: off}", None),
            ("{enginePriority: vllm}", "x-vllm-priority"),
            ("{enginePriority: sglang}", "x-override-priority"),
        ],
    )
    def test_engine(self, text: str, header: str | None) -> None:
        """Each model server has a header of its own for it."""
        engine = requests(text).engine()

        assert (engine and engine.header) == header


def test_settlement() -> None:
    """By default Envoy reports everything it can."""
    settlement = Settlement()

    assert settlement.access_log
    assert settlement.token_usage
    assert settlement.lost_after == 60_000_000_000
