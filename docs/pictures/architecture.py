# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pictures/architecture.png: the one direction data flows in."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

BOXES = {  # name: (x, y, text, colour)
    "model": (-0.2, 2.6, "nn.Module\nExportedProgram", "#e8e8e8"),
    "capture": (2.2, 2.6, "capture\ncapturing · skeleton · inputs", "#dbe9f6"),
    "program": (4.6, 2.6, "Program\nfx graph · store · facts", "#fff2cc"),
    "match": (7.0, 2.6, "match\npatterns · views · legality", "#dbe9f6"),
    "plan": (9.4, 2.6, "Plan (JSON)\nwho gets which site, and why not", "#fff2cc"),
    "calibrate": (7.0, 1.0, "calibrate\nmoments · samples · counts", "#dbe9f6"),
    "apply": (9.4, 1.0, "apply\nweights → codes, journalled edits", "#dbe9f6"),
    "optimized": (9.4, -0.6, "Optimized\none store, a program per call", "#fff2cc"),
    "verify": (7.0, -0.6, "verify · evaluate\ngolden run, perplexity, KL", "#dbe9f6"),
    "report": (4.6, -0.6, "Report · Diff\ntables and JSON", "#e8e8e8"),
    "out": (9.4, -2.2, "save · ONNX · pt2\nto_module", "#e8e8e8"),
}
ARROWS = [
    ("model", "capture"),
    ("capture", "program"),
    ("program", "match"),
    ("match", "plan"),
    ("plan", "apply"),
    ("calibrate", "apply"),
    ("apply", "optimized"),
    ("optimized", "verify"),
    ("verify", "report"),
    ("optimized", "out"),
]
W, H = 2.05, 0.85


def main() -> None:
    figure, axes = plt.subplots(figsize=(11.6, 5.6))
    for x, y, text, colour in BOXES.values():
        axes.add_patch(FancyBboxPatch((x, y), W, H, boxstyle="round,pad=0.03", facecolor=colour, edgecolor="#555"))
        head, _, rest = text.partition("\n")
        axes.text(x + W / 2, y + H * 0.66, head, ha="center", va="center", fontsize=10, weight="bold")
        axes.text(x + W / 2, y + H * 0.28, rest, ha="center", va="center", fontsize=6.8)
    for a, b in ARROWS:
        (xa, ya, *_), (xb, yb, *_) = BOXES[a], BOXES[b]
        if ya == yb:
            start, end = (
                ((xa + W + 0.03, ya + H / 2), (xb - 0.03, yb + H / 2))
                if xb > xa
                else ((xa - 0.03, ya + H / 2), (xb + W + 0.03, yb + H / 2))
            )
        else:
            start, end = (xa + W / 2, ya - 0.03), (xb + W / 2, yb + H + 0.03)
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#333", "lw": 1.3})
    (x, y, *_) = BOXES["program"]
    axes.annotate(
        "",
        xy=(7.0 - 0.03, 1.0 + H / 2),
        xytext=(x + W / 2, y - 0.03),
        arrowprops={"arrowstyle": "-|>", "color": "#333", "lw": 1.3, "connectionstyle": "angle,angleA=90,angleB=0"},
    )
    axes.set_xlim(-0.3, 11.7)
    axes.set_ylim(-2.4, 3.65)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
