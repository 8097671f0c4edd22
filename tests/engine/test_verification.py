# SPDX-License-Identifier: Apache-2.0
"""The golden run: sound rewrites pass, unsound ones are caught, and nothing outside is disturbed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, fx, nn

from rewriter.capturing import capture
from rewriter.errors import VerificationError
from rewriter.figures import EXACT, ulp
from rewriter.promotion import duplicate
from rewriter.verification import Verification, perturbed, verify

from .helpers import by_target, capture_graph, trace
from .small_models import KINDS, small_model

aten = torch.ops.aten
ROUNDING = 64 * torch.finfo(torch.float64).eps  # a few layers of it
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
Edit = Callable[[fx.Graph, fx.Node], None]


def edited(module: fx.GraphModule, packet: object, edit: Edit, *, which: int = 0) -> fx.GraphModule:
    """A copy in which ``edit`` changed the ``which``-th call of an operator."""
    copied = duplicate(module)
    edit(copied.graph, by_target(copied, packet)[which])
    copied.graph.eliminate_dead_code()
    copied.graph.lint()
    copied.recompile()
    return copied


def scaled(factor: float) -> Edit:
    """Multiply a value on its way to its readers."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_after(node):
            product = graph.call_function(aten.mul.Tensor, (node, factor))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)

    return edit


def without_bias(graph: fx.Graph, node: fx.Node) -> None:
    node.args = node.args[:2]


def alpha_two(graph: fx.Graph, node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "alpha": 2}


def to_sdpa(module: fx.GraphModule, *, scale: float = 1.0, mask_as_found: bool = True) -> fx.GraphModule:
    """Eager attention rewritten as one operator, by hand: matmul, scale, mask, softmax, casts, matmul."""
    copied = duplicate(module)
    for node in by_target(copied, aten.matmul):
        weights = _origin(node.args[0])
        if weights.target is not aten.softmax.int:
            continue
        scores = weights.args[0]
        scores, mask = scores.args if scores.target is aten.add.Tensor else (scores, None)
        product, factor = scores.args
        q, key_t = product.args
        assert scores.target is aten.mul.Tensor and key_t.target is aten.transpose.int
        arguments = (q, key_t.args[0], node.args[1], mask)
        with copied.graph.inserting_before(node):
            if mask is not None and not mask_as_found:
                seen = copied.graph.call_function(aten.gt.Scalar, (mask, -1.0))
                seen.meta["val"] = mask.meta["val"] > -1.0
                arguments = (*arguments[:3], seen)
            fused = copied.graph.call_function(
                aten.scaled_dot_product_attention.default, arguments, {"scale": factor * scale}
            )
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    assert len(by_target(copied, aten.scaled_dot_product_attention)) == 2
    return copied


def _origin(node: fx.Node) -> fx.Node:
    while node.target in (aten.to.dtype, aten.dropout.default):
        node = node.args[0]
    return node


def captured(
    kind: str, *, padding: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model, inputs = small_model(kind, "eager", padding=padding)
    inputs = {k: v.to(dtype) if k == "pixel_values" else v for k, v in inputs.items()}
    graph = capture_graph(model.to(dtype), (), inputs)
    return graph, tuple(v for v in inputs.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sound_attention_rewrite_passes_with_padding_and_rows_that_see_no_key(kind: str, dtype: torch.dtype) -> None:
    graph, flat = captured(kind, padding=True, dtype=dtype)
    result = verify(graph, to_sdpa(graph), flat).raise_if_failed()
    assert result.dtype == (str(dtype),)
    assert max(f.relative for f in result.outputs) < ROUNDING
    assert len(result.gradients) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_off_by_a_millionth_is_caught(kind: str) -> None:
    graph, flat = captured(kind)
    result = verify(graph, to_sdpa(graph, scale=1 + 1e-6), flat)
    assert not result.passed
    assert all(1e-12 < f.relative < 1e-3 for f in result.outputs)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_boolean_mask_is_another_function_only_where_a_row_sees_no_key(kind: str) -> None:
    graph, flat = captured(kind, padding=True)
    boolean = to_sdpa(graph, mask_as_found=False)
    assert verify(graph, boolean, (flat[0], torch.ones_like(flat[1]))).passed
    refused = verify(graph, boolean, flat)
    assert not refused.passed and refused.outputs[0].relative > 1e-3


def test_gradients_through_rows_that_see_no_key_are_noted_not_hidden() -> None:
    graph, flat = captured("gpt2", padding=True)
    result = verify(graph, to_sdpa(graph), flat)
    assert result.passed and result.notes
    assert all("gradient" in note for note in result.notes)
    assert not verify(graph, to_sdpa(graph), (flat[0], torch.ones_like(flat[1]))).notes


PLANTED = {
    "x + 2y": (aten.add, alpha_two),
    "no bias": (aten.linear, without_bias),
    "softmax of half": (aten.softmax, lambda g, n: n.update_arg(0, _half(g, n))),
    "one part in a million": (aten.linear, scaled(1 + 1e-6)),
    "one part in 2e9": (aten.linear, scaled(1 + 5e-10)),
    "another axis": (aten.softmax, lambda g, n: n.update_arg(1, -2)),
}


def _half(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        return graph.call_function(aten.mul.Tensor, (node.args[0], 0.5))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(self.two(self.one(x) + y), -1)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_wrong_rewrites_are_caught(name: str) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 6), torch.randn(3, 6))
    graph = capture_graph(Block(), inputs)
    packet, edit = PLANTED[name]
    result = verify(graph, edited(graph, packet, edit), inputs)
    assert not result.passed and not result.outputs[0].passed
    with pytest.raises(VerificationError, match=r"output 0: promoted to float64 the programs differ by .*"):
        result.raise_if_failed()


def test_a_dropped_gradient_is_caught() -> None:
    graph = trace(lambda x, w: (x @ w).relu(), torch.randn(3, 4), w=torch.randn(4, 4))

    def detached(g: fx.Graph, node: fx.Node) -> None:
        with g.inserting_before(node):
            node.update_arg(1, g.call_function(aten.detach.default, (node.args[1],)))

    wrong = edited(graph, aten.matmul, detached)
    inputs = (torch.randn(3, 4),)
    assert verify(graph, wrong, inputs, gradients=False).passed
    result = verify(graph, wrong, inputs)
    assert [f.name for f in result.gradients if not f.passed] == ["gradient of w"]


def test_a_rewrite_that_only_loses_accuracy_is_caught_in_the_own_dtype() -> None:
    """(x + 4096) − 4096: the same function, three decimal digits worse in float32."""
    graph = trace(lambda x, w: x @ w, torch.randn(3, 4), w=torch.randn(4, 4))

    def cancelling(g: fx.Graph, node: fx.Node) -> None:
        with g.inserting_after(node):
            up = g.call_function(aten.add.Tensor, (node, 4096.0))
        with g.inserting_after(up):
            down = g.call_function(aten.sub.Tensor, (up, 4096.0))
        up.meta, down.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(down, delete_user_cb=lambda user: user is not up)

    result = verify(graph, edited(graph, aten.matmul, cancelling), (torch.randn(3, 4),))
    assert not result.passed and "in torch.float32 the error" in result.reason
    figure = result.outputs[0]
    assert figure.relative < EXACT and figure.error_after > figure.allowed > figure.error_before


@given(st.integers(-9, -3), st.integers(0, 99), DTYPES)
@settings(deadline=None, max_examples=15)
def test_every_relative_change_above_the_limit_is_caught(exponent: int, seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(3, 5, generator=g).to(dtype), torch.randn(5, 4, generator=g).to(dtype)
    graph = trace(lambda x, w: x @ w, x, w=w)
    result = verify(graph, edited(graph, aten.matmul, scaled(1 + 10.0**exponent)), (x,))
    assert not result.passed
    assert math.isclose(result.outputs[0].relative, 10.0**exponent, rel_tol=1e-5)


@given(st.integers(0, 99), DTYPES)
@settings(deadline=None, max_examples=15)
def test_a_program_equals_itself_and_its_reassociation(seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, 5, generator=g).to(dtype) for _ in range(2))
    graph = trace(lambda x, y: torch.softmax(3 * (x + y), -1), x, y)
    same = verify(graph, graph, (x, y))
    assert same.passed and all(f.deviation == 0 for f in (*same.outputs, *same.gradients))
    assert all(f.error_before == f.error_after for f in same.outputs)
    commuted = edited(graph, aten.add, lambda _, n: setattr(n, "args", n.args[::-1]))
    assert verify(graph, commuted, (x, y)).passed


def test_rows_that_are_undefined_must_agree() -> None:
    scores = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]])
    eager = trace(lambda x: torch.softmax(x, -1), scores)
    same = verify(eager, trace(lambda x: torch.softmax(x + 0, -1), scores), (scores,))
    assert same.passed and same.outputs[0].undecided == 2
    zeros = verify(eager, trace(lambda x: torch.softmax(x, -1).nan_to_num(0.0), scores), (scores,))
    assert not zeros.passed and math.isinf(zeros.outputs[0].deviation)
    everywhere = verify(eager, eager, (torch.full((2, 2), -math.inf),))
    assert everywhere.passed and "nothing could be compared" in everywhere.notes[0]


def test_where_the_original_overflows_nothing_is_asked() -> None:
    x = torch.tensor([300.0, 1.0], dtype=torch.float16)
    graph = trace(lambda x: x * x / 16, x)  # 90 000 is no float16
    better = trace(lambda x: (x / 4) * (x / 4), x)
    result = verify(graph, better, (x,))
    assert result.passed and result.outputs[0].undecided == 1
    worse = verify(better, graph, (x,))
    assert not worse.passed and "in torch.float16 the error" in worse.reason


def test_integers_must_be_equal() -> None:
    x = torch.tensor([0.2, 0.9])
    graph = trace(lambda x: (x * 10).to(torch.int64), x)
    assert verify(graph, graph, (x,)).passed
    wrong = verify(graph, trace(lambda x: (x * 10).to(torch.int64) + 1, x), (x,))
    assert not wrong.passed and wrong.outputs[0].deviation == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), "only the rewritten program has it"),
        (lambda x: x[None], r"float32\[2, 3\] became float32\[1, 2, 3\]"),
        (lambda x: x.double(), r"float32\[2, 3\] became float64\[2, 3\]"),
    ],
)
def test_other_outputs_are_another_program(function: Callable[..., object], message: str) -> None:
    x = torch.randn(2, 3)
    identity = trace(lambda x: x * 1, x)
    with pytest.raises(VerificationError, match=message):
        verify(identity, trace(function, x), (x,)).raise_if_failed()


def test_a_program_that_does_not_run_is_an_error_that_says_which() -> None:
    x = torch.randn(2, 3)
    graph = trace(lambda x: x * 1, x)
    wrong = trace(lambda x, w: x @ w, x, w=torch.randn(3, 3))
    wrong.w = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(VerificationError, match="the rewritten program promoted to float64 does not run"):
        verify(graph, wrong, (x,))
    with pytest.raises(VerificationError, match=r"takes 1 flat tensors, but verify\(\) got 2"):
        verify(graph, graph, (x, x))
    with pytest.raises(VerificationError, match="Programs or GraphModules, not Linear"):
        verify(graph, nn.Linear(2, 2), (x,))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x))


def test_updated_buffers_are_compared_and_random_programs_meet_the_same_numbers() -> None:
    model, x = Stateful().train(), torch.randn(5, 4)
    graph = capture_graph(model, (x,))
    result = verify(graph, duplicate(graph), [(x,), (2 * x,)])
    assert result.passed and result.samples == 2
    names = {f.name for f in result.outputs}
    assert {"buffer norm.running_mean", "buffer norm.num_batches_tracked"} < names
    frozen = edited(graph, aten.add_, lambda g, n: g.erase_node(n))
    wrong = verify(graph, frozen, (x,))
    assert wrong.reason == "buffer norm.num_batches_tracked: the rewritten program does not have it"


def test_nothing_outside_changes() -> None:
    model, x = Stateful().train(), torch.randn(5, 4)
    graph = capture_graph(model, (x,))
    inside = torch.randn(5, 4)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, graph)]
    random, kept = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        assert len(verify(graph, duplicate(graph), (x,)).gradients) == 3
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert verify(graph, duplicate(graph), (inside,)).passed
    assert torch.equal(torch.get_rng_state(), random)
    for module, state in zip((model, graph), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert torch.equal(x, kept) and not x.requires_grad


def test_programs_give_their_inputs_and_outputs_names() -> None:
    model, inputs = small_model("vit", "eager")
    program = capture(model, None, inputs)
    result = verify(program, program, program.example)
    assert [f.name for f in result.outputs] == ["output logits"]
    assert result.gradients[0].name == "gradient of input pixel_values"
    assert "gradient of classifier.weight" in {f.name for f in result.gradients}


def test_the_result_is_json_and_a_table() -> None:
    x = torch.randn(2, 3)
    graph = trace(lambda x: x * 2, x)
    good, bad = verify(graph, graph, (x,)), verify(graph, trace(lambda x: x[None], x), (x,))
    for result in (good, bad):
        data = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert data["passed"] is result.passed
        assert [f["name"] for f in data["outputs"]] == ["output 0"]
        assert data["outputs"][0]["passed"] is result.passed
    assert bad.to_json()["outputs"][0]["deviation"] == "inf"
    assert "golden run FAILED" in _shown(bad) and "float32[2, 3] became" in _shown(bad)
    assert "golden run passed" in _shown(good) and "gradient of input 0" in _shown(good)


def _shown(result: Verification) -> str:
    console = Console(width=110)
    with console.capture() as captured_text:
        console.print(result)
    return captured_text.get()


def test_perturbed_inputs_are_general_reproducible_and_keep_integers() -> None:
    inputs = (torch.zeros(2, 3, dtype=torch.bfloat16), torch.arange(3))
    one, again, other = perturbed(inputs), perturbed(inputs), perturbed(inputs, seed=1)
    assert one[0].dtype is torch.bfloat16 and one[0].abs().min() > 0
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    assert torch.equal(one[1], inputs[1])
    assert not inputs[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1.0, 1.5, 0.3, 1000.0])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    x = torch.tensor(value, dtype=dtype)
    following = torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))
    assert ulp(dtype, float(x)) == float(following.double() - x.double())
    assert ulp(torch.int64, value) == 0
