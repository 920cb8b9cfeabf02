"""Two services in one place: the second says so and leaves."""

import subprocess
from pathlib import Path

import pytest
import yaml

from flowcontrol_server.common.addresses import Address
from tests.e2e.gateway import Gateway
from tests.e2e.harness import ROOT
from tests.support.ports import HOST, free_port

pytestmark = pytest.mark.e2e


class TestSecondService:
    """Each would gate half of the requests, were they to share a port."""

    @pytest.mark.parametrize("taken", ["extProc", "grpc", "http"])
    async def test_port_is_taken(self, gateway: Gateway, taken: str, tmp_path: Path) -> None:
        """Whichever of its ports is taken, it exits with 2 and names the address."""
        stack = gateway.stack
        configuration = yaml.safe_load(stack.config.read_text())
        address = configuration["listen"][taken]
        ports = {name: str(Address(HOST, free_port())) for name in configuration["listen"]}
        configuration["listen"] = ports | {taken: address}
        configuration["objectives"]["directory"] = str(stack.objectives)
        config = tmp_path / "flowcontrol.yaml"
        config.write_text(yaml.safe_dump(configuration))
        command = [*stack.spec.service, "serve", "--config", str(config)]
        second = subprocess.run(  # noqa: ASYNC221 - nothing else is going on
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
        caller = await gateway.call()
        await (await gateway.next_call()).respond()
        reply = await caller.reply()

        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].startswith(f"cannot listen on {address}: ")
        assert "Traceback" not in second.stderr
        assert reply.status == 200
