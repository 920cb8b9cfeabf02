"""Flow control for inference gateways: the engine. Theory of operation.

A model server takes every request it is given and queues what it cannot run; inside it, that queue
cannot be reordered. This engine holds the queue in front of the servers and decides which requests
go, which wait, which have waited too long and which are refused at once.

The idea in four sentences. A request is decided exactly once, by one machine, owned by one thread.
The machine is given what happened and the time; it answers with decisions and with the next moment
at which it must be woken. Everything else (gRPC, asyncio, threads, clocks, logs) is a shell that
carries facts in and decisions out. So the machine can be tested against a ledger, simulated and
replayed, and it needs no lock because one thread alone uses it.

    gate ── Arrived, Left, ... ──▶ Inbox ──▶ FlowProcessor ──▶ FlowController
                                                (a thread)         (pure)
         ◀── one wake-up per batch ── [Decision, ...] ◀──────────────┘

The words, each used one way only:

    band        one priority level; it exists because an objective declares it (band 0: when needed)
    flow        the requests of one fairness id in one band
    lease       a live request's hold on its flow, from arrival to the end of its stream
    slot        one unit of a model server's concurrency, held by a request in flight
    saturation  load of the pool; 1.0 is full
    ceiling     the saturation at which a band is gated
    reject      refuse before queueing
    evict       remove from the queue undispatched
    displace    evict for a better arrival
    drain       refuse arrivals, decide all that wait, stop

The invariants, checked in every test and the first of them in every turn:

    arrived = waiting + in flight + ended + refused
    every request is decided exactly once
    nothing waits while a slot is free and its band is not gated
    no lower band is served while a higher one has work waiting

Where to read on: `controller` (the machine), `processor` (the turn), `inbox` (the one lock).
"""
