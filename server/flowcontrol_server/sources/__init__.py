"""Sources of the facts that do not come with a request: one module per source.

Each source watches one place and reports its whole content whenever that changes. `feed` runs the
sources and turns their reports into facts for the inbox. No source touches the engine's state.

    folder, kube_objectives, objective_store ──────────────▶ ObjectivesChanged ─┐
    static, dns, endpoint_file, kube_endpoints ─▶ roster ──▶ EndpointsChanged ──┼─▶ inbox
    scraper (engine_metrics, health), orca ────────────────▶ LoadObserved ──────┘

For every source: while it is unreachable, half written or invalid, its last good content stays in
effect. The error is counted, logged once and shown as a problem. A source that fails in an
unexpected way is restarted, with a growing delay.
"""
