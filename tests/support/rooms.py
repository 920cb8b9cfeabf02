"""Draws docs/rooms.svg, the imports between the rooms: `python -m tests.support.rooms`.

The graph comes from grimp, the layout from Graphviz, whose `dot` must be installed.
"""

import subprocess
from collections import Counter
from pathlib import Path

import grimp

PICTURE = Path(__file__).parents[2] / "docs" / "rooms.svg"
SERVER = "flowcontrol_server"


def room_of(module: str) -> str:
    """Return the room of a module; a module outside of the rooms is its own room."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if package == "flowcontrol":
        return f"engine/{name}" if name in {"replay", "simulation", "views", "v1"} else "engine"
    return name if name and name != "__main__" else "cli"


def arrows() -> Counter[tuple[str, str]]:
    """Return the number of imports from each room to each other."""
    graph = grimp.build_graph("flowcontrol", SERVER)
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = room_of(module), room_of(imported)
            if pair[0] != pair[1]:
                found[pair] += 1
    return found


def main() -> None:
    """Draw the graph, and print its content."""
    found = arrows()
    lines = [f'"{a}" -> "{b}" [label={n}]' for (a, b), n in sorted(found.items())]
    style = 'rankdir=TB; node [shape=box, fontname="sans-serif"]; edge [fontsize=9, color=gray50]'
    text = "\n".join(["digraph rooms {", style, *lines, "}"])
    drawn = subprocess.run(
        ["dot", "-Tsvg"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    PICTURE.write_text(drawn.stdout)
    rooms = {room for pair in found for room in pair}
    print(f"{len(rooms)} rooms, {len(found)} arrows, {sum(found.values())} imports")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
