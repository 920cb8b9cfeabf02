"""The service around the engine: from Envoy's streams to facts, from decisions to answers.

    Envoy ─▶ ext_proc (a door) ─▶ exchange (the conversation) ─▶ gate ══▶ the engine
                  codec: bytes            classify, replies: pure

Where to read on: `service` (start, drain and crash on one page), `gate` (the bridge).
"""
