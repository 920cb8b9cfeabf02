"""The Dockerfile, read instruction by instruction."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction of the Dockerfile, in its stage."""

    stage: int
    name: str
    arguments: str


def dockerfile() -> list[Instruction]:
    """Return the Dockerfile's instructions, lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    stage, instructions = -1, []
    for line in lines:
        if line and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            stage += name == "FROM"
            instructions.append(Instruction(stage, name, arguments.strip()))
    return instructions


def arguments_of(name: str, stage: int = 1) -> list[str]:
    """Return the arguments of all instructions of a name in a stage; the last stage is 1."""
    return [each.arguments for each in dockerfile() if (each.stage, each.name) == (stage, name)]


def copied() -> list[str]:
    """Return the files that the build stage copies from the checkout."""
    return [source for line in arguments_of("COPY", stage=0) for source in line.split()[:-1]]
