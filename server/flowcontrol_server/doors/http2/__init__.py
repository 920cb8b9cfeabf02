"""HTTP/2 for one purpose: a server of gRPC streams, sans I/O (RFC 9113, RFC 7541).

    bytes ─▶ connection ─▶ events              frames: what stands on the wire
    calls ─▶ connection ─▶ bytes               headers: field blocks, read and judged
                                               outflow: what may be sent when
                                               limits: how much of anything is too much

Nothing here knows a socket, a loop, a clock or an application: time is an argument, output is
fetched. `grpc_framing` is what gRPC adds on top; `doors.direct` is the shell around it all.
"""
