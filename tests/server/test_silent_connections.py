"""Silent connections on every port leave Envoy's door and liveness alone."""

import socket
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.ports import free_ports
from tests.support.served import configuration, lines_until, serving

DESCRIPTORS = 700
"""Fewer than the ports may need, as where the system's limit is low."""
SILENT = 300
"""On each of three ports: more than there are descriptors."""
TIMEOUT_S = 20.0


@pytest.mark.slow
def test_other_ports_are_flooded(tmp_path: Path) -> None:
    """Though 900 connections say nothing, Envoy's door and /healthz answer."""
    ports = free_ports(3)
    limit = ("sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh")
    with serving(configuration(tmp_path, ports), prefix=limit) as process, ExitStack() as stack:
        events = [line["event"] for line in lines_until(process, "service_started")]
        for port in ports:
            for _ in range(SILENT):
                silent = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
                stack.enter_context(silent)

        direct = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{ports[0]}"))
        check = health_pb2_grpc.HealthStub(direct).Check
        reply = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        url = f"http://127.0.0.1:{ports[2]}/healthz"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as healthz:
            status = healthz.status

    assert "descriptors_scarce" in events
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert status == 200
