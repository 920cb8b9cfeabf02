"""Models of the world around the controller: pure, deterministic, on a clock the caller holds."""
