"""What the tests of the store and of the election share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.valkey_server import ValkeyServer


@pytest.fixture(name="server")
def _server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server that runs."""
    server = ValkeyServer(tmp_path)
    server.start()
    yield server
    server.stop()
