"""Draws docs/benchmarks.png from results/through_envoy.txt: what a gate costs a request.

python tests/benchmarks/draw.py
"""

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[2] / "docs" / "benchmarks.png"
COLOURS = {
    "Envoy alone": "#9aa5ab",
    "C++ no-op": "#b98a3d",
    "grpcio door": "#8f5fc4",
    "direct door": "#0c6e76",
    "compiled": "#0a4f8f",
}
PANELS = (
    ("small", 0, "requests/s, small prompts"),
    ("small", 3, "CPU of the processor, us a request"),
    ("220 KB", 0, "requests/s, prompts of 220 KB"),
)
"""Load, column, title."""


def medians(text: str) -> dict[str, dict[str, list[float]]]:
    """Return the columns of each contender by load: the number before each parenthesis."""
    found: dict[str, dict[str, list[float]]] = {}
    load = ""
    for line in text.splitlines():
        if match := re.match(r"(.+): \d+ connections", line):
            load = match[1]
        for name in COLOURS:
            if line.startswith(f"  {name} ") and "(" in line:
                numbers = re.findall(r"([\d,.]+) \(", line)
                found.setdefault(load, {})[name] = [float(n.replace(",", "")) for n in numbers]
    return found


def main() -> None:
    """Draw."""
    mpl.use("Agg")
    text = (RESULTS / "through_envoy.txt").read_text()
    found = medians(text)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.2), constrained_layout=True)
    for axis, (load, column, title) in zip(axes, PANELS, strict=True):
        rows = [(name, row[column]) for name, row in found[load].items() if row[column]]
        bars = axis.barh(
            [name for name, _ in rows],
            [value for _, value in rows],
            color=[COLOURS[name] for name, _ in rows],
        )
        axis.bar_label(bars, labels=[f"{value:,.0f}" for _, value in rows], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False, bottom=False, labelbottom=False)
    figure.supxlabel(text.splitlines()[0], fontsize=7, color="#666666")
    figure.savefig(PICTURE, dpi=120)
    print(f"drawn: {PICTURE}")


if __name__ == "__main__":
    main()
