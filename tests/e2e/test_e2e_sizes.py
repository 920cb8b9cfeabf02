"""What waits is measured, announced or not: maxBytes bounds what Envoy holds."""

import pytest

from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec

pytestmark = pytest.mark.e2e

JSON = {"content-type": "application/json"}
CHUNKED = JSON | {"transfer-encoding": "chunked"}
BODY = b'{"prompt": "' + b"x" * 600_000 + b'"}'


@pytest.fixture(scope="module")
def spec() -> Spec:
    """One slot; bodies of a mebibyte may wait."""
    return Spec(flow_control={"maxBytes": "1Mi"})


@pytest.mark.parametrize("is_announced", [True, False], ids=["announced", "chunked"])
async def test_counted(gateway: Gateway, *, is_announced: bool) -> None:
    """A body counts by its size, and one too many is refused."""
    occupant, slot = await gateway.occupy()
    headers = JSON if is_announced else CHUNKED
    first = await gateway.call(headers=headers, body=BODY)
    snapshot = await gateway.until(waiting=1)
    second = await gateway.call(headers=headers, body=BODY)

    assert snapshot.waiting_bytes == len(BODY)
    assert (await second.reply()).status == 429
    await first.hang_up()
    await gateway.until(waiting=0)
    await slot.respond()
    await occupant.reply()
