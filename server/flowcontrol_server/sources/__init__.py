"""Where the engine's facts come from, requests apart: one module per source.

Each source watches one place and reports all that it holds whenever that changes; `feed` runs
them and turns what they report into facts for the inbox. None touches the engine's state.

    folder, kube_objectives, objective_store ──▶ ObjectivesChanged ─┐
    static, dns, endpoint_file, kube_endpoints ─▶ roster ──▶ EndpointsChanged ─┼─▶ inbox
    scraper (engine_metrics, health) ─────────────▶ LoadObserved ─┘

What holds for all of them: the last known good answer stays in force while a source is out of
reach, half written or wrong; the mistake is counted, logged once and shown; and a source that fails
in an unexpected way is started again, later each time.
"""
