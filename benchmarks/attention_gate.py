# SPDX-License-Identifier: Apache-2.0
"""From which length linear attention pays on this processor, beside what `passes/linear_attention/gate.py` believes.

.venv/bin/python benchmarks/attention_gate.py               # one thread
.venv/bin/python benchmarks/attention_gate.py --threads 2

*overhead* is what the gate's constant stands for: how many times longer an operation of the linear form took than one of
`scaled_dot_product_attention`, both at that length. The constants are set so that the two columns of lengths agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timing import interleaved, machine
from torch import Tensor

from rewriter.passes.linear_attention import gate
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.maps import MAPS

HEADS, KEY_HEADS, WIDTH, WINDOW = 8, 4, 64, 64
LENGTHS = tuple(1 << n for n in range(6, 13))
FORMS = {
    "elu": Form("elu", WIDTH**-0.5, 0, "sliding", 0, "max", True, HEADS),
    "hedgehog, window": Form("hedgehog", WIDTH**-0.5, WINDOW, "sliding", 0, "max", True, HEADS),
    "landmark, window": Form("landmark", WIDTH**-0.5, WINDOW, "sliding", 0, "none", True, HEADS),
    "relu, window": Form("relu", WIDTH**-0.5, WINDOW, "sliding", 0, "none", True, HEADS),
    "elu, both directions": Form("elu", WIDTH**-0.5, 0, "sliding", 0, "max", False, HEADS),
    "hedgehog, terrace": Form("hedgehog", WIDTH**-0.5, WINDOW, "terrace", 0, "max", True, HEADS),
    "landmark, sinks": Form("landmark", WIDTH**-0.5, WINDOW, "sliding", 4, "none", True, HEADS),
    "delta": Form("elu", WIDTH**-0.5, 0, "sliding", 0, "max", True, HEADS, rule="delta"),
    "key gates": Form("elu", WIDTH**-0.5, 0, "sliding", 0, "max", True, HEADS, gate="key"),
}


def tensors(form: Form, features: int) -> dict[str, Tensor]:
    """Parameters of a site by role, small enough that no exponential overflows."""
    made = {}
    for role in form.roles:
        of_key = role.startswith("key_")
        heads = KEY_HEADS if of_key else HEADS
        columns = WIDTH if role.endswith("_map") else features
        shapes = {"weight": (heads, WIDTH, columns), "map": (heads, WIDTH, columns), "bias": (heads, columns)}
        per_head = (KEY_HEADS if role == "beta" else HEADS,)
        shape = per_head if role == "map_scale" else shapes.get(role.rpartition("_")[2], per_head)
        made[role] = 0.1 * torch.randn(shape)
    return made


def measured(form: Form, length: int) -> tuple[float, float]:
    """(seconds of softmax over seconds of the form, overhead of an operation) at a length."""
    features = WIDTH if form.is_mixture else MAPS[form.feature_map].width(WIDTH)
    given = tensors(form, features)
    q, k, v = (torch.randn(1, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    sides = {
        "linear": lambda: form.call(q, k, v, None, given),
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=form.causal, enable_gqa=True),
    }
    with torch.no_grad():
        times = {name: timing.median for name, timing in interleaved(sides, runs=7).items()}
    flops = gate.linear(form, KEY_HEADS, WIDTH, features, length).flops
    per_linear = times["linear"] / flops
    per_softmax = times["softmax"] / gate.softmax(form, KEY_HEADS, WIDTH, length).flops
    return times["softmax"] / times["linear"], per_linear / per_softmax


def row(name: str, form: Form) -> tuple[str, ...]:
    """Lengths are tried upwards until the form wins."""
    features = WIDTH if form.is_mixture else MAPS[form.feature_map].width(WIDTH)
    believed = gate.pays_from(form, KEY_HEADS, WIDTH, features, "cpu")
    ratio = overhead = 0.0
    for length in LENGTHS:
        ratio, overhead = measured(form, length)
        if ratio >= 1:
            return name, str(length), str(believed), f"{ratio:.2f} ×", f"{overhead:.2f}"
    return name, f"> {LENGTHS[-1]}", str(believed), f"{ratio:.2f} ×", f"{overhead:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("forms", nargs="*", help=f"of {', '.join(FORMS)}; default: all")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print(machine())
    print("form | pays from | the gate says | softmax / linear there | overhead there")
    for name in given.forms or FORMS:
        print(" | ".join(row(name, FORMS[name])), flush=True)


if __name__ == "__main__":
    main()
