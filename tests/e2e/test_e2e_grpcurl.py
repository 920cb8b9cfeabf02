"""The service in the hands of a person with grpcurl: reflection, health, snapshot, and Process."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2

from flowcontrol_server.admin import api as admin
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.requests import codec
from tests.e2e.gateway import FREED_S, Gateway
from tests.e2e.harness import ADMIN_TOKEN

pytestmark = pytest.mark.e2e

GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
PROCESS = f"{codec.SERVICE}/Process"
ARRIVAL = {"request_headers": {"headers": {"headers": [{"key": ":path", "value": "/v1/by-hand"}]}}}
PROOF = ("-H", f"authorization: Bearer {ADMIN_TOKEN}")
ANSWER_S = 20.0


async def grpcurl(*arguments: str) -> str:
    """Run grpcurl to its end; return what it prints."""
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), ANSWER_S)
    assert process.returncode == 0, output.decode()
    return output.decode()


def protoset(directory: Path, *files: FileDescriptor) -> str:
    """Write what the direct door, which has no reflection, would tell; return the file's name."""
    found: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        for other in file.dependencies:
            add(other)
        if file.name not in found:
            found[file.name] = descriptor_pb2.FileDescriptorProto()
            file.CopyToProto(found[file.name])

    for file in files:
        add(file)
    path = directory / "known.protoset"
    known = descriptor_pb2.FileDescriptorSet(file=found.values())
    path.write_bytes(known.SerializeToString())
    return str(path)


class TestReflection:
    """What there is to call."""

    async def test_list(self, gateway: Gateway) -> None:
        """The port lists exactly what it serves."""
        listed = await grpcurl(str(gateway.stack.grpc), "list")

        assert sorted((codec.SERVICE, admin.SERVICE, HEALTH, REFLECTION)) == listed.split()

    async def test_describe(self, gateway: Gateway) -> None:
        """The one method of ext_proc is described as Envoy defines it."""
        described = await grpcurl(str(gateway.stack.grpc), "describe", codec.SERVICE)

        expected = (
            "rpc Process ( stream .envoy.service.ext_proc.v3.ProcessingRequest ) "
            "returns ( stream .envoy.service.ext_proc.v3.ProcessingResponse );"
        )
        assert expected in described


class TestCalls:
    """Calls by hand."""

    async def test_health(self, gateway: Gateway, tmp_path: Path) -> None:
        """Both ports say how the service is, in all and by name."""

        async def check(address: Address, service: str, *known: str) -> str:
            data = json.dumps({"service": service})
            reply = json.loads(await grpcurl(*known, "-d", data, str(address), f"{HEALTH}/Check"))
            return str(reply["status"])

        stack = gateway.stack
        names = ("", codec.SERVICE, "readiness", "liveness", "inference-extension")
        answers = [await check(stack.grpc, name) for name in names]
        assert isinstance(stack.ext_proc, Address)
        known = ("-protoset", protoset(tmp_path, health_pb2.DESCRIPTOR))
        answers += [await check(stack.ext_proc, name, *known) for name in names]

        assert answers == ["SERVING"] * 10

    async def test_snapshot(self, gateway: Gateway) -> None:
        """The snapshot reads well as JSON."""
        _, occupying = await gateway.occupy()
        method = f"{admin.SERVICE}/GetSnapshot"
        snapshot = json.loads(await grpcurl(str(gateway.stack.grpc), method))
        await occupying.respond()

        assert (
            snapshot["pool"],
            snapshot["in_flight"],
            snapshot["saturation"],
        ) == ("llama", "1", 1)
        assert [band.get("priority", 0) for band in snapshot["bands"]] == [10, 0, -1]

    async def test_requests(self, gateway: Gateway) -> None:
        """One request explained, decisions listed, a flow evicted: as the README has it."""
        _, occupying = await gateway.occupy()
        waiting = await gateway.call(name="waiting")
        await gateway.until(waiting=1)

        async def ask(method: str, **data: object) -> dict[str, Any]:
            address = str(gateway.stack.grpc)
            text = await grpcurl(
                *PROOF, "-d", json.dumps(data), address, f"{admin.SERVICE}/{method}"
            )
            answer: dict[str, Any] = json.loads(text)
            return answer

        listed = await ask("ListDecisions", count_max=1)
        newest = int(listed["decisions"][0]["request_id"])
        explained = await ask("Explain", request_id=str(newest + 1))
        evicted = await ask(
            "EvictFlow", priority=explained.get("priority", 0), flow_id=explained["flow_id"]
        )
        reply = await waiting.reply()
        await occupying.respond()

        assert listed["decisions"][0]["outcome"] == "dispatched"
        assert (explained["state"], explained["gate"]) == ("WAITING", "POOL_FULL")
        assert evicted == {"evicted": "1"}
        assert reply.status == 429
        assert reply.headers["x-llm-d-request-dropped-reason"] == "evicted-operator"

    @pytest.mark.parametrize("port", ["ext_proc", "grpc"])
    async def test_process(self, gateway: Gateway, tmp_path: Path, port: str) -> None:
        """A person can be Envoy: the slot is theirs as long as their input stays open."""
        known = (
            ("-protoset", protoset(tmp_path, envoy_messages.ProcessingRequest.DESCRIPTOR.file))
            if port == "ext_proc"
            else ()
        )
        address = str(getattr(gateway.stack, port))
        process = await asyncio.create_subprocess_exec(
            *(GRPCURL, "-plaintext", *known, "-d", "@", address, PROCESS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(ARRIVAL).encode())
        await process.stdin.drain()
        held = await gateway.until(in_flight=1)
        waiting = await gateway.call(name="waiting")
        await gateway.until(waiting=1)
        process.stdin.close()
        call = await gateway.next_call(FREED_S)
        await call.respond()
        reply = await waiting.reply()
        output = await asyncio.wait_for(process.stdout.read(), ANSWER_S)
        status = await process.wait()

        assert (held.in_flight, held.waiting) == (1, 0)
        assert (call.name, reply.status) == ("waiting", 200)
        assert status == 0
        assert {"request_headers", "dynamic_metadata"} == json.loads(output).keys()
