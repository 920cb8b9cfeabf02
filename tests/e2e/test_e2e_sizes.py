"""What waits is measured, announced or not: maxBytes bounds what Envoy holds."""

import pytest

from flowcontrol_server.requests.codec import UNSENT_BYTES_MAX
from tests.e2e.conftest import Start
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


async def test_unsent(start: Start) -> None:
    """A gigabyte that is announced and not sent takes no more room than a megabyte."""
    gateway = await start(Spec(flow_control={"maxBytes": "4Mi"}))
    occupant, slot = await gateway.occupy()
    upload = {"content-type": "application/octet-stream", "content-length": str(2**30)}
    silent = await gateway.call(headers=upload, body=None)
    snapshot = await gateway.until(waiting=1)
    other = await gateway.call(headers=JSON, body=BODY)
    await gateway.until(waiting=2)

    assert UNSENT_BYTES_MAX < snapshot.waiting_bytes < UNSENT_BYTES_MAX + 2_000
    await silent.hang_up()
    await other.hang_up()
    await gateway.until(waiting=0)
    await slot.respond()
    await occupant.reply()
