"""HTTP/2 for one purpose: a server of gRPC streams, sans I/O (RFC 9113, RFC 7541).

    bytes ─▶ connection ─▶ events              frames: the format on the wire
    calls ─▶ connection ─▶ bytes               headers: decoding and checking field blocks
                                               outflow: flow control of output
                                               limits: limits of everything a client may send

No module here uses a socket, a loop, a clock or an application: time is an argument, and output is
returned. `grpc_framing` adds gRPC; `doors.direct` is the shell around all of it.
"""
