"""The client of the admin API."""

import grpc
import pytest

from flowcontrol_server.admin.client import AdminSource, channel_options


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_goes_past_a_proxy_to_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """A proxy in the environment is not shown the token, nor asked for what is on its loopback."""
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    source = AdminSource(f"{host}:{port}", "a-token-of-some-length")

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await source.decisions()
    await source.close()
    await server.stop(None)

    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, "it came to the server"


@pytest.mark.parametrize(
    ("address", "is_direct"),
    [
        ("[::1]:9003", True),
        ("127.0.0.9:9003", True),
        ("gate.localhost:9003", True),
        ("10.0.0.5:9003", False),
        ("gate:9003", False),
    ],
)
def test_elsewhere_by_the_proxy(address: str, *, is_direct: bool) -> None:
    """Another machine is reached as the environment says."""
    assert (("grpc.enable_http_proxy", 0) in channel_options(address)) is is_direct
