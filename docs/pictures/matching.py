# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pictures/matching.png from benchmarks/results/engine.json: time over graph size, both axes logarithmic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "engine.json"
STYLES = {  # side -> colour, marker, line
    "rewriter": ("#c0392b", "o", "-"),
    "torch.fx": ("#2c3e50", "s", "-"),
    "Inductor": ("#2980b9", "^", "-"),
    "Inductor, replace_by_example": ("#2980b9", "v", "--"),
    "Inductor, register_replacement": ("#2980b9", "D", ":"),
    "onnxscript": ("#7f8c8d", "P", "-"),
}
TITLES = {"match": "matching", "rewrite": "matching, rewriting and recompiling"}
LIMIT = 60.0


def draw(axes: Axes, data: dict[str, Any], task: str) -> None:
    stops = 0
    for side, (colour, marker, line) in STYLES.items():
        cells = [c for c in data["cells"] if (c["task"], c["side"]) == (task, side)]
        points = [(c["nodes"], c["seconds"]) for c in cells if c["seconds"] is not None]
        if points:
            width = 2.6 if side == "rewriter" else 1.4
            axes.loglog(*zip(*points, strict=True), line, marker=marker, color=colour, label=side, linewidth=width)
        # An open mark on the line at which a task was stopped, side by side; larger graphs were not tried.
        stopped = next((c["nodes"] for c in cells if c["seconds"] is None), None)
        if stopped is not None:
            stops += 1
            axes.plot(
                stopped * 0.82 ** (stops - 1),
                LIMIT,
                marker=marker,
                color=colour,
                markerfacecolor="white",
                linestyle="none",
            )
    axes.axhline(LIMIT, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.annotate(
        "stopped after 60 s",
        (axes.get_xlim()[0], LIMIT),
        (4, 3),
        textcoords="offset points",
        color="#777777",
        fontsize=8,
    )
    axes.set_title(TITLES[task], fontsize=11)
    axes.set_xlabel("nodes")
    axes.grid(True, which="major", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    data = json.loads(RESULTS.read_text())
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, task in zip(both, TITLES, strict=True):
        draw(axes, data, task)
    both[0].set_ylabel("seconds")
    handles, labels = both[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(HERE / "matching.png", dpi=130)


if __name__ == "__main__":
    main()
