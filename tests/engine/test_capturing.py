# SPDX-License-Identifier: Apache-2.0
"""Capturing: what is unwrapped, noted, refused by name, and how a refusal points at the user's line."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rewriter
from rewriter import store
from rewriter.errors import CaptureError, ExportError
from rewriter.passes import ShiftAdd
from rewriter.program import Program

from . import kinds
from .kinds import KINDS, tokens

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


# ---------------------------------------------------------------------------------------------- the dialect


@pytest.mark.parametrize("kind", KINDS)
def test_the_dialect(kind: str) -> None:
    program = kinds.optimized(kind, "identity").program
    nodes = list(program.graph.nodes)
    reads = [node.target for node in nodes if node.op == "get_attr" and node.target not in program.bodies]
    assert len(reads) == len(set(reads))
    for node in nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert node.op == "output" or "val" in node.meta
        assert "assert" not in str(node.target) and "set_grad" not in str(node.target)
    for name in reads:
        assert program.tensor(name) is not None
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple) and all(isinstance(o, torch.fx.Node) for o in outputs)
    paths = {path for node in nodes for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    assert not [path for path in paths if path.startswith("wrapped")]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_length_are_free(kind: str) -> None:
    program = kinds.optimized(kind, "identity").program
    sizes = [s for node in program.graph.find_nodes(op="placeholder") for s in node.meta["val"].shape[:1]]
    assert sizes and not [s for s in sizes if isinstance(s, int)]


def test_static_shapes_on_request() -> None:
    program = rewriter.capture(small(), X, dynamic_shapes="static")
    assert [tuple(n.meta["val"].shape) for n in program.graph.find_nodes(op="placeholder")] == [(4, 8)]
    with pytest.raises(CaptureError, match='"auto" or "static", not "free"'.replace('"free"', "'free'")):
        rewriter.capture(small(), X, dynamic_shapes="free")


def test_any_graph_module_is_a_program() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    program = Program.from_graph_module(graph_module, (X,))
    assert torch.equal(program(X), torch.relu(X) + 1)


# ---------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("kind", "noted"), [("gpt2", True), ("llama", True), ("bert", True), ("vit", False), ("sequential", False)]
)
def test_a_cache_that_is_switched_off_is_noted(kind: str, noted: bool) -> None:
    model = kinds.build(kind)
    before = getattr(model.config, "use_cache", None) if hasattr(model, "config") else None
    report = rewriter.optimize(model, []).report
    assert any("use_cache" in note for note in report.notes) == noted
    assert before is None or model.config.use_cache == before


def test_asking_for_the_cache_says_where_to_get_it() -> None:
    opt = kinds.optimized("llama", "identity")
    with pytest.raises(CaptureError, match=r"cache cannot leave a captured graph; call opt\.to_module\(\)"):
        opt(tokens(1, 4), use_cache=True)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DataParallel", "compile"]
)
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small()
    opt = rewriter.optimize(wrap(model), [ShiftAdd(group=8)], example_inputs=X)
    assert any(note.startswith("unwrapped") for note in opt.report.notes)
    assert [site.address.path for site in opt.plan.sites] == ["0", "2"]
    assert torch.equal(opt(X), rewriter.optimize(model, [ShiftAdd(group=8)], example_inputs=X)(X))


def test_forward_hooks_are_part_of_the_graph_and_noted() -> None:
    model = small()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    opt = rewriter.optimize(model, [], example_inputs=X)
    assert opt.report.notes == ("forward hooks of '0' are part of the captured graph",)
    assert torch.equal(opt(X), model(X))


# ------------------------------------------------------------------------------------------------- refusals


def backward_hook() -> nn.Module:
    model = small()
    model[2].register_full_backward_hook(lambda module, gi, go: None)
    return model


def on_meta() -> nn.Module:
    model = small()
    model[2].to("meta")
    return model


def sparse() -> nn.Module:
    model = small()
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse())
    return model


class Subclass(Tensor):
    """A tensor of someone else's."""


def subclass() -> nn.Module:
    model = small()
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Subclass))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (backward_hook, r"'2' has backward hooks.*remove them"),
        (on_meta, r"'2\.weight' is on the meta device.*load the checkpoint"),
        (sparse, r"'2\.weight' has layout torch\.sparse_coo.*to_dense"),
        (subclass, r"'2\.weight' is a Subclass.*plain tensor"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)),
            r"'1\.weight' is not initialised \(lazy module\); run the model once",
        ),
        (lambda: torch.jit.script(small()), "ScriptModule cannot be captured: pass the eager module"),
    ],
    ids=["backward hook", "meta", "sparse", "subclass", "lazy", "script"],
)
def test_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        rewriter.optimize(make(), [ShiftAdd(group=8)], example_inputs=X)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.sum().item() > 0:  # the line to point at
            y = y * 2
        return y


def test_a_refusal_of_export_shows_the_users_line() -> None:
    model = Untraceable()
    with pytest.raises(CaptureError) as caught:
        rewriter.optimize(model, [], example_inputs=X)
    message = str(caught.value)
    assert "torch.export refuses Untraceable" in message
    assert "test_capturing.py" in message and "the line to point at" in message and "in forward" in message
    assert "make that line traceable" in message
    assert len(message.splitlines()) <= 5  # not a trace of torch's internals


class Returning(nn.Module):
    def __init__(self, build: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.build = nn.Linear(8, 8), build

    def forward(self, x: Tensor) -> Any:
        return self.build(self.layer(x))


Pair = namedtuple("Pair", ["left", "right"])


def pair(y: Tensor) -> Pair:
    return Pair(y, y + 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda y: (y, y + 1),
        lambda y: [y, {"a": y * 2, "b": None}],
        lambda y: {"deep": {"list": [y], "number": 3, "text": "t"}},
        lambda y: y,
        lambda y: (y, y),
        pair,
    ],
    ids=["tuple", "list", "nested", "tensor", "same twice", "namedtuple"],
)
def test_outputs_keep_their_structure(build: Callable[[Tensor], Any]) -> None:
    model = Returning(build).eval()
    opt = rewriter.optimize(model, [], example_inputs=X)
    actual, expected = opt(X), model(X)
    assert type(actual) is type(expected)
    assert str(actual) == str(expected)


def test_a_class_of_ones_own_survives_pickle_but_is_no_business_of_a_file(tmp_path: Path) -> None:
    opt = rewriter.optimize(Returning(pair).eval(), [], example_inputs=X)
    script = (
        "import pickle, sys, torch; opt = pickle.load(sys.stdin.buffer); print(type(opt(torch.zeros(4, 8))).__name__)"
    )
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(opt),
        capture_output=True,
        check=True,
        env=os.environ | here,
    )
    assert done.stdout.decode().strip() == "Pair"
    with pytest.raises(ExportError, match=r"Pair cannot be stored.*return a tuple or a dict"):
        opt.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"object cannot be an argument or result.*use tensors"):
        rewriter.optimize(Returning(lambda y: object()), [], example_inputs=X)


def test_an_example_without_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match="has no tensor"):
        rewriter.capture(Returning(lambda y: y), (3,))


# ------------------------------------------------------------------------------------- parametrised weights


@pytest.mark.parametrize(
    "parametrisation", [parametrizations.weight_norm, parametrizations.orthogonal], ids=lambda p: p.__name__
)
def test_parametrised_weights_are_computed_in_the_graph_and_left_alone(
    parametrisation: Callable[[nn.Module], nn.Module],
) -> None:
    model = small()
    parametrisation(model[2])
    opt = rewriter.optimize(model, [ShiftAdd(group=8)], example_inputs=X)
    assert [site.address.path for site in opt.plan.sites] == ["0"]
    assert any(miss.site.startswith("2") and "computed" in miss.reason for miss in opt.plan.misses)
    identity = rewriter.optimize(model, [], example_inputs=X)
    torch.testing.assert_close(identity(X), model(X))
    identity(X).sum().backward()
    trained = [n for n, p in identity.named_parameters() if p.grad is not None]
    assert any("parametrizations" in name for name in trained)


# ------------------------------------------------------------------------------- an ExportedProgram's calls


def exported(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(
            self, x: Tensor, zeta: Tensor | None = None, alpha: Tensor | None = None, factor: float = 1.0
        ) -> Tensor:
            return self.layer(x) * factor + (zeta if zeta is not None else 0) - (alpha if alpha is not None else 0)

    return torch.export.export(Mixed().eval(), args, kwargs, strict=False)


def test_keywords_of_an_exported_program_in_any_order() -> None:
    program = exported(X, zeta=X + 1, alpha=X * 2)
    opt = rewriter.optimize(program, [])
    expected = program.module()(X, zeta=X + 1, alpha=X * 2)
    assert torch.equal(opt(X, zeta=X + 1, alpha=X * 2), expected)
    assert torch.equal(opt(X, alpha=X * 2, zeta=X + 1), expected)


def test_constants_of_an_exported_program_are_part_of_its_call() -> None:
    program = exported(X, X + 1, None, 3.0)
    opt = rewriter.optimize(program, [])
    assert torch.equal(opt(X, X + 1, None, 3.0), program.module()(X, X + 1, None, 3.0))
    with pytest.raises(CaptureError, match=r"this one knows: \(tensor, tensor, None, 3\.0\)"):
        opt(X, X + 1, None, 4.0)


def test_a_missing_output_of_an_exported_program_is_none_in_its_place() -> None:
    program = torch.export.export(Returning(lambda y: (None, y, {"a": None, "b": y + 1})), (X,), strict=False)
    opt = rewriter.optimize(program, [])
    assert str(opt(X)) == str(program.module()(X))


def test_an_exported_program_that_was_cast_can_be_undone() -> None:
    opt = copy.deepcopy(kinds.optimized("exported", "all")).double()
    back = opt.undo("vq_logits").undo("shift_add").undo("fuse")
    call = kinds.plain("exported").to(torch.float64)
    torch.testing.assert_close(call(back), call(kinds.build("exported").double()))


# -------------------------------------------------------------------------------------------------- tensors


def test_tensors_are_shared_until_written() -> None:
    model = small()
    program = rewriter.capture(model, X)
    assert all(torch._C._is_cow_tensor(t) for t in program.tensors().values())
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.equal(program.tensor("0.weight"), model[0].weight)


def test_ties_and_buffers_are_known_under_all_their_names() -> None:
    program = kinds.optimized("gpt2", "identity").program
    assert program.aliases["transformer.wte.weight"] == ("transformer.wte.weight", "lm_head.weight")
    assert program.tensors()["lm_head.weight"] is program.tensors()["transformer.wte.weight"]
    normed = kinds.optimized("sequential", "identity")
    assert store.is_persistent(normed, "1.running_mean") and not store.is_persistent(
        kinds.optimized("llama", "identity"), "model.rotary_emb.inv_freq"
    )


def test_constants_of_the_code_are_lifted_and_shared_by_content() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 2.0]) + torch.tensor([1.0, 2.0])

    model, x = Fixed(), torch.randn(3, 2)
    opt = rewriter.optimize(model, [], example_inputs=x)
    assert torch.equal(opt(x), model(x)) and not opt.state_dict()
    assert torch.equal(copy.deepcopy(opt)(x), model(x))


def test_what_vmap_leaves_in_a_graph_is_refused_with_its_line() -> None:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with TransformGetItemToIndex():  # as transformers did it for masks before its fifth series
                return torch.vmap(lambda i: x[i])(torch.arange(x.shape[0]))

    with pytest.raises(CaptureError, match="only tensors can be constants") as caught:
        rewriter.capture(Mapped(), X)
    assert "test_capturing.py" in str(caught.value)
