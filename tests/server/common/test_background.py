"""Tasks nobody waits for."""

import asyncio

from structlog.testing import capture_logs

from flowcontrol_server.common.background import in_background
from tests.support.told import eventually


async def fail() -> None:
    """Fail."""
    raise ValueError


class TestInBackground:
    """Said at once, if it fails."""

    async def test_failure(self) -> None:
        """With its exception, while somebody still holds the task."""
        with capture_logs() as logs:
            task = in_background(fail(), "work_failed")
            await eventually(task.done)
            await asyncio.sleep(0)

        assert [line["event"] for line in logs] == ["work_failed"]
        assert isinstance(logs[0]["exc_info"], ValueError)

    async def test_end(self) -> None:
        """Nothing is said of work that is done, or not wanted any more."""
        with capture_logs() as logs:
            await in_background(asyncio.sleep(0), "work_failed")
            task = in_background(asyncio.sleep(60), "work_failed")
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        assert logs == []
