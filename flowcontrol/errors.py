"""Pure. The errors this package raises.

    FlowControlError
    ├── ConfigError        a setting, or the relation of two, is wrong
    ├── NotRunningError    the processor has stopped; nothing more is accepted
    ├── ListenError        an address cannot be listened on
    └── LedgerError        a decision ledger cannot be read or written

What becomes of a request is never an exception: it is an `Outcome`.
"""

# interpreted: it seldom runs


class FlowControlError(Exception):
    """Base of every error raised on purpose in this package."""


class ConfigError(FlowControlError):
    """Invalid settings; lists every problem, one per line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotRunningError(FlowControlError):
    """The processor has stopped."""


class LedgerError(FlowControlError):
    """A decision ledger that cannot be read by this version, or cannot be written."""


class ListenError(FlowControlError):
    """An address that cannot be listened on; gives the reason."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")
