# SPDX-License-Identifier: Apache-2.0
"""Runs the main job and writes docs/demo.md: what it printed, and the machine it ran on.

.venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from timing import machine

ROOT = Path(__file__).resolve().parent.parent
LM = "examples/tiny_lm"
COMMAND = [
    "rewriter", "optimize", LM, "--passes", "fuse,shift_add:embeddings=true,vq_logits",
    "--calibration", f"{LM}/calibration.safetensors", "--evaluate", f"{LM}/held_out.safetensors", "--onnx", "out/tiny_lm.onnx",
]  # fmt: skip

PAGE = """# The numbers of the demo

Written by `benchmarks/demo.py`, which runs what `make demo` runs. Every figure below was computed by that run.

```
{command}
```

Machine: {machine}. Wall time: {seconds:.0f} s.

```
{output}
```

How to read it

- *before* and *after* count bytes as stored, against the fp16 checkpoint ([sizes](format.md)); codes, scales, codebooks and
  index maps all count.
- *weight error* is ‖W − Ŵ‖ / ‖W‖; *output error* the relative error of x Wᵀ over the calibration inputs; *bits* are stored bits
  per weight with scales; *head KL* is KL(dense head ‖ codebook head) in nats per token on calibration positions that
  the fit did not see.
- Perplexity, KL and agreement are those of `rewriter.evaluate` on held-out text: not trained on, and used neither for
  calibration nor for the choice of the head's size.
- Latency is of whole calls, on this machine alone; docs/benchmarks_cpu.md compares operators side by side.
"""


def main() -> int:
    environment = os.environ | {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    start = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).parent / COMMAND[0], *COMMAND[1:]],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        return done.returncode
    output = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip()
    page = PAGE.format(command=" ".join(COMMAND), machine=machine("fx-rewriter"), seconds=time.perf_counter() - start, output=output)
    (ROOT / "docs" / "demo.md").write_text(page)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
