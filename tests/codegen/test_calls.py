# SPDX-License-Identifier: Apache-2.0
"""Arguments like those of a program's example, made from what its graph says of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.codegen.calls import calls, example_of


@given(st.data())
def test_layout_and_values(data: st.DataObject) -> None:
    """Sizes and strides are kept, also of slices, transposes and expanded tensors; integers are zeros, the rest ones."""
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
    tensor = torch.empty(shape, dtype=dtype)
    kind = data.draw(st.sampled_from(["plain", "transposed", "slice", "expanded"]))
    if kind == "transposed":
        tensor = tensor.transpose(0, -1)
    elif kind == "slice":
        tensor = torch.empty([*shape[:-1], shape[-1] + 2], dtype=dtype)[..., 1:-1]
    elif kind == "expanded":
        tensor = tensor[:1].expand(-1 if shape[0] == 0 else 3, *shape[1:])
    for device in ("cpu", "meta"):
        made = example_of(tensor, device)
        assert (made.shape, made.stride(), made.dtype, made.device.type) == (
            tensor.shape,
            tensor.stride(),
            dtype,
            device,
        )
    made = example_of(tensor, "cpu")
    assert bool((made == (0 if dtype in (torch.int64, torch.uint8) else 1)).all())


def test_symbols_stand_for_the_sizes_of_the_example_and_parameters_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).eval()
    program = rewriter.optimize(model, ["shift_add"], (torch.randn(5, 3, 8),)).program
    [call] = calls(program)
    x, codes, scale, *_ = call.arguments("cpu")
    assert (call.site, call.rule, x.shape) == ("0", "shift_add.linear", (5, 3, 8))
    held = dict(program.root.named_buffers()) | dict(program.root.named_parameters())
    assert all(any(torch.equal(t, other) for other in held.values() if other.dtype == t.dtype) for t in (codes, scale))
    assert all(a.is_meta for a in call.arguments("meta") if isinstance(a, Tensor))
