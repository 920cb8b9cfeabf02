"""The table of the ext_proc conversations in docs/design.md."""

from pathlib import Path

from flowcontrol_server.requests.exchange import MOVES, PARTINGS, MessageKind, Move, Phase

PAGE = Path(__file__).parents[2] / "docs" / "design.md"
BEGIN, END = "<!-- conversation: generated -->", "<!-- /conversation -->"


def table() -> str:
    """Return the table of phases, messages and the reaction to each; a dash is an error."""
    kinds = [kind.value.replace("_", " ") for kind in MessageKind]
    lines = ["| conversation, phase | " + " | ".join(kinds) + " | stand-down |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for (mode, phase), moves in MOVES.items():
        if phase is not Phase.OVER:
            cells = [move.value if isinstance(move, Move) else "-" for move in moves]
            parting = PARTINGS.get((mode, phase))
            cells.append("-" if parting is None else parting.value)
            lines.append(f"| {mode.value}, {phase.name.lower()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rewritten(page: str) -> str:
    """Return the page with the current table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
