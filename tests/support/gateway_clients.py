"""Gateways whose client of an endpoint picker differs from Envoy's, after their source code.

Each behaves as its product does, and fails where the product would.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import grpc

from flowcontrol_server.common import envoy_messages
from tests.support.direct import PROCESS, Stream
from tests.support.gates import TIMEOUT_S

DESTINATION = "x-gateway-destination-endpoint"
_DUPLEX = envoy_messages.ProcessingMode.FULL_DUPLEX_STREAMED


async def unverified(port: int) -> grpc.aio.Channel:
    """A channel over TLS that accepts any certificate; grpcio must get the certificate first."""
    shown = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    name = [("grpc.ssl_target_name_override", "flowcontrol")]
    credentials = grpc.ssl_channel_credentials(shown.encode())
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, name)


class Picked(NamedTuple):
    """The result for a gateway: where to send the request, or the reply to send instead."""

    endpoint: str = ""
    status: int = 0
    body: bytes = b""


def _destination(response: Any) -> str:
    """Return the first header with that name; both gateways use the first."""
    mutation = response.request_headers.response.header_mutation
    for option in mutation.set_headers:
        if option.header.key.lower() == DESTINATION:
            raw: bytes = option.header.raw_value
            return raw.decode()
    return ""


@final
class NginxGatewayFabric:
    """One request of NGINX Gateway Fabric 2.6 (cmd/gateway/endpoint_picker.go).

    Sends headers with their text in `value` and the whole body in one message, without modes. Then
    it half-closes and reads until the server ends the stream. There is no response phase.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = Stream(channel, PROCESS)

    async def ask(self, body: bytes | None) -> None:
        """Send the headers and the body."""
        await self.open(has_body=body is not None)
        await self.send(body)

    async def open(self, *, has_body: bool) -> None:
        """Send the headers."""
        request = envoy_messages.ProcessingRequest()
        request.request_headers.end_of_stream = not has_body
        headers = {
            ":method": "POST" if has_body else "GET",
            ":path": "/v1/chat/completions",
            "host": "models",
        }
        for name, value in headers.items():
            request.request_headers.headers.headers.add(key=name, value=value)
        await self._stream.say(request.SerializeToString())

    async def send(self, body: bytes | None) -> None:
        """Send the whole body, if there is one, then half-close."""
        if body is not None:
            whole = {"body": body, "end_of_stream": True}
            message = envoy_messages.ProcessingRequest(request_body=whole)
            await self._stream.say(message.SerializeToString())
        await self._stream.end()

    async def pick(self) -> Picked:
        """Read until the end of the stream; return the result."""
        picked = Picked()
        while True:
            data = await asyncio.wait_for(self._stream.call.read(), TIMEOUT_S)
            if not isinstance(data, bytes):
                break
            response = envoy_messages.ProcessingResponse.FromString(data)
            if response.HasField("immediate_response"):
                immediate = response.immediate_response
                picked = Picked(status=immediate.status.code, body=immediate.body)
            elif response.HasField("request_headers"):
                picked = Picked(_destination(response))
        code, details = await self._stream.ending()
        assert code is grpc.StatusCode.OK, details
        return picked

    def cancel(self) -> None:
        """Reset the stream, because the client has disconnected."""
        self._stream.call.cancel()


@final
class Agentgateway:
    """One request of agentgateway 1.4 (crates/agentgateway/src/http/ext_proc.rs).

    It announces its modes, sends no metadata with a request and accepts one address. A stream that
    the server ends early is an error. If its client disconnects, it half-closes.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = Stream(channel, PROCESS)

    async def open(self, *, has_body: bool = True, path: str = "/v1/chat/completions") -> None:
        """Send the headers of the request."""
        request = envoy_messages.ProcessingRequest()
        request.request_headers.end_of_stream = not has_body
        request.protocol_config.request_body_mode = _DUPLEX
        request.protocol_config.response_body_mode = _DUPLEX
        for name, value in {":method": "POST", ":path": path}.items():
            request.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        await self._stream.say(request.SerializeToString())

    async def picked(self) -> Picked:
        """Wait for the answer to the headers."""
        response = await self._stream.hear()
        if response.HasField("immediate_response"):
            immediate = response.immediate_response
            return Picked(status=immediate.status.code, body=immediate.body)
        assert response.HasField("request_headers"), "any other answer is an error there"
        endpoint = _destination(response)
        host, _, port = endpoint.rpartition(":")
        assert "," not in endpoint, "EPP returned invalid address"
        assert host, "EPP returned invalid address"
        assert port.isdigit(), "EPP returned invalid address"
        return Picked(endpoint)

    async def send(self, parts: Sequence[bytes], *, is_request: bool = True) -> None:
        """Send a body in parts; the last part carries the end."""
        for number, part in enumerate(parts, 1):
            content = {"body": part, "end_of_stream": number == len(parts)}
            name = "request_body" if is_request else "response_body"
            message = envoy_messages.ProcessingRequest(**{name: content})
            await self._stream.say(message.SerializeToString())

    async def echoed(self, *, is_request: bool = True) -> bytes:
        """Read a body back to its end; a reply without a body part is an end, too."""
        body = b""
        while True:
            response: Any = await self._stream.hear()
            name = "request_body" if is_request else "response_body"
            assert response.WhichOneof("response") == name
            mutation = getattr(response, name).response.body_mutation
            body += bytes(mutation.streamed_response.body)
            if (
                not mutation.HasField("streamed_response")
                or mutation.streamed_response.end_of_stream
            ):
                return body

    async def respond(self, served: str) -> None:
        """Send the headers of the response, with its endpoint, and wait for the reply."""
        request = envoy_messages.ProcessingRequest()
        request.response_headers.headers.headers.add(key=":status", raw_value=b"200")
        fields = request.metadata_context.filter_metadata["envoy.lb"].fields
        fields[f"{DESTINATION}-served"].string_value = served
        await self._stream.say(request.SerializeToString())
        response = await self._stream.hear()
        assert response.HasField("response_headers"), "any other answer is an error there"

    async def is_open(self) -> bool:
        """Whether the server has not ended the stream, which would be an error: NoMoreResponses."""
        return not self._stream.call.done()

    async def end(self) -> None:
        """Half-close: the exchange is over, or the client has disconnected."""
        await self._stream.end()
