"""An upload has its time: a body that never ends holds no slot for ever.

Envoy's clock for it, request_timeout, is as generated but for its length. It begins with a request
and ends with the last byte of its body: long waits and long answers outlive it.
"""

from typing import Any

import pytest

from tests.e2e.client import Caller
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e


def hurry(configuration: dict[str, Any]) -> None:
    """Shorten the time for an upload, in which minutes are meant."""
    (chain,) = configuration["static_resources"]["listeners"][0]["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    assert "request_timeout" in manager
    manager["request_timeout"] = "1s"


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot."""
    return Spec(edit_envoy=hurry)


async def unfinished(gateway: Gateway) -> Caller:
    """A request whose body, which Envoy does not hold to read it, never comes."""
    headers = {"content-type": "text/plain", "content-length": "2"}
    return await gateway.call(headers=headers, body=None)


async def test_dispatched(gateway: Gateway) -> None:
    """A request that was dispatched before its body was whole does not keep the slot."""
    slow = await unfinished(gateway)
    await gateway.until(in_flight=1)
    other = await gateway.call()

    assert (await slow.reply()).status == 408
    await (await gateway.next_call()).respond()
    assert (await other.reply()).status == 200


async def test_long_waits_and_answers(gateway: Gateway) -> None:
    """Only what has not arrived is hurried, neither what waits nor what is answered."""
    answered = await gateway.call()
    answer = await gateway.next_call()
    await answer.stream(b"x")
    await answered.head()
    waiting = await gateway.call()
    await gateway.until(waiting=1)
    slow = await unfinished(gateway)

    assert (await slow.reply()).status == 408  # all three are older than the limit
    await answer.end()
    assert await answered.rest() == b"x"
    await (await gateway.next_call()).respond()
    assert (await waiting.reply()).status == 200
