"""Pure. Questions about the engine's state; they go the way of the facts, and change nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from flowcontrol.controller import FlowController


@final
@dataclass(slots=True)
class Asked:
    """One question, answered in the turn it is taken in, after that turn's decisions."""

    question: Callable[[FlowController, int], object]
    """Reads the controller at a time; raising is an answer, too, and harms nobody else."""
    reply: Callable[[object], None]
    """Called in the processor's thread with the answer, or the exception; must return at once."""
