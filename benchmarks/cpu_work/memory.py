# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the loss, fused and unfused: each in a process of its own, above what its inputs take.

python benchmarks/cpu_work/memory.py ours|unfused    prints the bytes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def loss_memory() -> tuple[int, int]:
    """Bytes of the fused and of the unfused loss with its gradients, the gradients themselves not counted."""

    def measured(side: str) -> int:
        done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, check=True)
        return int(done.stdout)

    return measured("ours"), measured("unfused")


def _resident(kind: str) -> int:
    """Bytes resident: now (VmRSS), or the most since the last reset (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def _measure(side: str) -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from cpu_work import layers

    torch.set_num_threads(1)
    small = layers.loss_call(64, True)[side]
    small()  # libraries and their buffers are loaded
    call = layers.loss_call(layers.POSITIONS, True)[side]
    held = layers.gradient_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: the small call had its own
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before - held


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
