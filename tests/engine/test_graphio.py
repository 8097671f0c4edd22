# SPDX-License-Identifier: Apache-2.0
"""Graphs as data: what is written is read back as the same graph, and nothing else is read."""

from __future__ import annotations

import copy
import functools
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from rewriter.errors import ExportError, LoadError
from rewriter.graphio import GRAPH_VERSION, graph_from_json, graph_to_json, is_safe_name
from rewriter.graphops import lookup, spell


def captured(model: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any] | None) -> fx.GraphModule:
    """The training IR with flat tensor inputs and one flat output list."""
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    module = program.module(check_guards=False)
    graph = module.graph
    output = graph.output_node()
    output.args = ([n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, fx.Node)],)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph)


def resolver(module: nn.Module) -> Callable[[str], Tensor]:
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    return tensors.__getitem__


def through_text(module: fx.GraphModule) -> tuple[dict[str, Any], fx.GraphModule]:
    data = graph_to_json(module)
    text = json.dumps(data, allow_nan=False)
    return data, graph_from_json(json.loads(text), resolver(module))


def vocabulary_model(kind: str, attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small: dict[str, Any] = {"vocab_size": 96, "attn_implementation": attention, "use_cache": False}
    wide: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **small, **ids))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, intermediate_size=48, **small, **wide))
    return BertModel(BertConfig(intermediate_size=48, max_position_embeddings=32, **small, **wide))


def transformer(kind: str, attention: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=8, attn_implementation=attention,
        )  # fmt: skip
        pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
        return ViTForImageClassification(config).eval(), pixels, {"pixel_values": {0: Dim.AUTO}}
    ids = torch.randint(0, 96, (2, 7))
    both = {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return vocabulary_model(kind, attention).eval(), inputs, {"input_ids": both, "attention_mask": both}


def fresh_inputs(module: fx.GraphModule, batch: int, length: int) -> list[Tensor]:
    inputs = []
    for node in module.graph.find_nodes(op="placeholder"):
        if node.name == "pixel_values":
            inputs.append(torch.randn(batch, 3, 16, 16))
        elif node.name == "attention_mask":
            inputs.append((torch.arange(length) >= torch.arange(batch)[:, None]).long())
        else:
            inputs.append(torch.randint(0, 96, (batch, length)))
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "vit"])
def test_captured_transformers_compute_the_same_after_the_round_trip(kind: str, attention: str) -> None:
    model, inputs, dynamic = transformer(kind, attention)
    module = captured(model, inputs, dynamic)
    data, again = through_text(module)
    for batch, length in ((2, 7), (3, 11), (1, 1)):
        flat = fresh_inputs(module, batch, length)
        with torch.no_grad():
            expected, found = module(*flat), again(*flat)
        assert len(expected) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert graph_to_json(again) == data
    for before, after in zip(module.graph.nodes, again.graph.nodes, strict=True):
        assert (before.op, before.name) == (after.op, after.name)
        assert _appearance(before) == _appearance(after)
        assert before.meta.get("stack_trace") == after.meta.get("stack_trace")
        assert list(before.meta.get("nn_module_stack", ())) == list(after.meta.get("nn_module_stack", ()))


def _appearance(node: fx.Node) -> Any:
    """What `meta["val"]` says, readable: dtypes, devices, symbolic shapes and strides."""
    value = node.meta.get("val")
    leaves = pytree.tree_leaves(value)
    return [
        (v.dtype, v.device, str(v.shape), str(v.stride()), v.requires_grad) if isinstance(v, Tensor) else str(v)
        for v in leaves
    ]


def test_loaded_values_are_symbolic_in_one_environment() -> None:
    module = captured(*transformer("llama", "sdpa"))
    _, again = through_text(module)
    values = [n.meta["val"] for n in again.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    modes = {id(v.fake_mode) for v in values}
    assert len(modes) == 1
    ids = next(n for n in again.graph.nodes if n.name == "input_ids").meta["val"]
    batch, length = ids.shape
    assert isinstance(batch, torch.SymInt) and (batch.node.hint, length.node.hint) == (2, 7)
    with ids.fake_mode:  # further analysis on a loaded program: propagate an operator
        wider = torch.ops.aten.unsqueeze.default(ids, 2).expand(-1, -1, 4)
    assert str(wider.shape) == str(torch.Size([batch, length, 4]))


class Regions(nn.Module):
    """Autocast and a data-dependent branch: graphs inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
        return torch.cond(y.sum() > 0, lambda a: a + 1, lambda a: a * 2, (y.float(),))


def test_nested_graphs() -> None:
    torch.manual_seed(0)
    module = captured(Regions(), {"x": torch.randn(3, 4)}, {"x": {0: Dim.AUTO}})
    _, again = through_text(module)
    outputs = set()
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(5, 4)
        (expected,), (found,) = module(x), again(x)
        assert torch.equal(expected, found)
        outputs.add(bool((found == found.bfloat16() * 2).all()))
    bodies = [m for m in again.modules() if isinstance(m, fx.GraphModule) and m is not again]
    assert len(bodies) == 3


class Arguments(nn.Module):
    """One of every kind of argument the format knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor) -> list[Tensor]:
        n = x.shape[0]
        wide = torch.nn.functional.gelu(x, approximate="tanh").to(torch.float64)
        filled = x.masked_fill(self.mask, float("-inf")).nan_to_num(nan=0.5, neginf=-2.0)
        clamped = x.clamp(max=float("inf"))
        grown = torch.zeros(n * 2 + 1, max(3, n), device="cpu", dtype=torch.int64)
        image = x.reshape(1, 1, n, 4).to(memory_format=torch.channels_last)
        picked = x[1:, ::2]
        return [wide, filled, clamped, grown, image, picked, torch.cat((x, x), 1), x.new_full((2,), n / 2)]


def test_every_kind_of_argument() -> None:
    module = captured(Arguments(), {"x": torch.randn(6, 4)}, {"x": {0: Dim("n", min=4, max=64)}})
    data, again = through_text(module)
    assert graph_to_json(again) == data
    for n in (4, 6, 9):
        x = torch.randn(n, 4)
        for expected, found in zip(module(x), again(x), strict=True):
            assert torch.equal(expected, found) and expected.stride() == found.stride()
    text = json.dumps(data)
    for kind in ('{"text": "tanh"}', '{"float": "-inf"}', '{"dtype": "float64"}', '{"device": "cpu"}'):
        assert kind in text
    assert '"memory_format": "channels_last"' in text


_UNARY = [torch.ops.aten.neg.default, torch.ops.aten.relu.default, torch.ops.aten.tanh.default]
_BINARY = [torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.maximum.default]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_random_graphs_compute_the_same_after_the_round_trip(data: st.DataObject) -> None:
    """Any wiring of a few operators, scalars and keyword arguments, with several outputs and dead nodes."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(data.draw(st.integers(1, 12))):
        one, other = data.draw(st.sampled_from(nodes)), data.draw(st.sampled_from(nodes))
        kind = data.draw(st.sampled_from(["unary", "binary", "scaled", "scalar", "cat"]))
        if kind == "unary":
            nodes.append(graph.call_function(data.draw(st.sampled_from(_UNARY)), (one,)))
        elif kind == "binary":
            nodes.append(graph.call_function(data.draw(st.sampled_from(_BINARY)), (one, other)))
        elif kind == "scaled":
            alpha = data.draw(st.sampled_from([2, -0.5]))
            nodes.append(graph.call_function(torch.ops.aten.add.Tensor, (one, other), {"alpha": alpha}))
        elif kind == "scalar":
            scalar = data.draw(st.floats(width=32) | st.integers(-5, 5))
            nodes.append(graph.call_function(torch.ops.aten.mul.Tensor, (one, scalar)))
        else:
            joined = graph.call_function(torch.ops.aten.cat.default, ([one, other], 1))
            nodes.append(graph.call_function(torch.ops.aten.slice.Tensor, (joined, 1, 1, 4)))
    graph.output(data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=4)))
    module = fx.GraphModule(nn.Module(), graph)
    written, again = through_text(module)
    assert graph_to_json(again) == written
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for expected, found in zip(module(x, y), again(x, y), strict=True):
        assert torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))


@functools.cache
def small_text() -> str:
    """A tiny valid graph to spoil: linear, then a view of symbolic sizes."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x).view(x.shape[0] * 2, 3)

    return json.dumps(graph_to_json(captured(Small(), {"x": torch.zeros(5, 4)}, {"x": {0: Dim.AUTO}})))


def small() -> dict[str, Any]:
    """A fresh copy, to be spoiled."""
    return dict(json.loads(small_text()))


PARTS = {"part.weight": nn.Parameter(torch.ones(6, 4)), "part.bias": nn.Parameter(torch.zeros(6))}


def load(data: Any) -> fx.GraphModule:
    return graph_from_json(data, PARTS.__getitem__)


def node_of(data: dict[str, Any], op: str, target: str = "") -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["op"] == op and target in n.get("target", ""))


def test_the_small_graph_is_valid() -> None:
    module = load(small())
    assert module(torch.ones(3, 4))[0].shape == (6, 3)
    assert isinstance(module.get_parameter("part.weight"), nn.Parameter)


def set_target(target: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: node_of(data, "call_function", "aten.linear").update(target=target)


def set_args(*args: Any, target: str = "aten.linear.default", **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: node_of(data, "call_function", "aten.linear").update(
        target=target, args=list(args), kwargs=kwargs
    )


def set_value(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: node_of(data, "call_function", "aten.linear").update(value=value)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


X = {"node": "x"}
FLOATS = {"dtype": "float32", "stride": [4, 1], "device": "cpu", "requires_grad": False}

HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_version": (lambda d: d.pop("version"), "no version"),
    "newer": (lambda d: d.update(version=GRAPH_VERSION + 1), "newer version"),
    "boolean_version": (lambda d: d.update(version=True), "version"),
    "extra_key": (lambda d: d.update(code="import os"), "expected the keys"),
    "unknown_operator": (set_target("aten.no_such_thing.default"), "no such operator"),
    "unknown_overload": (set_target("aten.linear.no_such"), "no such operator"),
    "reads_files": (set_args({"text": "/etc/passwd"}, target="aten.from_file.default"), "more than compute"),
    "prints": (set_args({"text": "hi"}, target="aten._print.default"), "private operators"),
    "backward": (set_target("aten._backward.default"), "private operators"),
    "out_variant": (set_target("aten.add.out"), "out="),
    "resizes": (set_args(X, [100], target="aten.resize_.default"), "more than compute"),
    "storage": (set_target("aten.set_.source_Storage"), "refused"),
    "dunder": (set_target("__class__"), "not on the list"),
    "dunder_of_packet": (set_target("aten.linear.__class__"), "not on the list"),
    "dunder_packet": (set_target("aten.__class__.mro"), "refused"),
    "builtin": (set_target("builtins.eval"), "not on the list"),
    "os": (set_target("os.system"), "not on the list"),
    "operator_module": (set_target("operator.attrgetter"), "not on the list"),
    "methodcaller": (set_target("operator.methodcaller"), "not on the list"),
    "torch_load": (set_target("torch.load"), "not on the list"),
    "math_module": (set_target("math.__loader__"), "not on the list"),
    "other_namespace": (set_target("prims.device_put.default"), "not on the list"),
    "higher_order": (set_target("higher_order.print"), "not on the list"),
    "unregistered": (set_target("rewriter.evil.default"), "no such operator"),
    "target_not_text": (set_target(["aten", "linear"]), "short text"),
    "no_target": (lambda d: node_of(d, "call_function", "aten.linear").pop("target"), "short text"),
    "call_module": (lambda d: node_of(d, "call_function").update(op="call_module"), "unknown kind of node"),
    "call_method": (lambda d: node_of(d, "call_function").update(op="call_method"), "unknown kind of node"),
    "op_not_text": (lambda d: node_of(d, "call_function").update(op=[1]), "unknown kind of node"),
    "later_reference": (set_args({"node": "output"}, X), "no earlier node"),
    "own_reference": (set_args({"node": "linear"}, X), "no earlier node"),
    "missing_reference": (set_args({"node": "ghost"}, X), "no earlier node"),
    "reference_not_text": (set_args({"node": ["x"]}, X), "no earlier node"),
    "name_twice": (lambda d: d["nodes"].insert(0, copy.deepcopy(d["nodes"][0])), "two nodes are called"),
    "code_in_name": (lambda d: node_of(d, "placeholder").update(name="x=print(1)"), "not an identifier"),
    "newline_in_name": (lambda d: node_of(d, "placeholder").update(name="x\nimport os"), "not an identifier"),
    "keyword_name": (lambda d: node_of(d, "placeholder").update(name="lambda"), "not an identifier"),
    "self": (lambda d: node_of(d, "placeholder").update(name="self"), "not an identifier"),
    "placeholder_target": (lambda d: node_of(d, "placeholder").update(target="x=1"), "no arguments"),
    "unknown_key": (lambda d: node_of(d, "placeholder").update(type_expr="os"), "malformed"),
    "code_in_kwarg": (set_args(X, X, **{"bias=print(1), b": None}), "identifiers as keys"),
    "unknown_kwarg": (set_args(X, X, bais=None), "unknown or repeated argument"),
    "too_many_args": (set_args(X, X, None, None), "positional arguments"),
    "missing_args": (set_args(X), "missing"),
    "text_argument": (set_args(X, {"text": "__import__('os')"}), "not a text"),
    "text_in_list": (set_args([{"text": "a"}], target="aten.cat.default"), "not a text"),
    "bare_text": (set_args(X, "code"), "not an argument"),
    "deep_argument": (set_args(nested(40), X), "nested deeper"),
    "huge_integer": (set_args(2**70, X), "beyond 64 bits"),
    "unknown_argument": (set_args({"object": "os.system"}, X), "not an argument"),
    "two_kinds": (set_args({"node": "x", "text": "y"}, X), "not an argument"),
    "bad_float": (set_args({"float": "1e400"}, X), "not a float"),
    "bad_device": (set_args({"device": "cpu; import os"}, X), "unknown device"),
    "unknown_device": (set_args({"device": "privateuseone"}, X), "unknown device"),
    "bad_dtype": (set_args({"dtype": "__class__"}, X), "unknown dtype"),
    "bad_layout": (set_args({"layout": "sparse_coo"}, X), "not an argument"),
    "operator_arity": (set_args(X, target="operator.add"), "takes 2 arguments"),
    "operator_text": (set_args(X, {"text": "a"}, target="operator.getitem"), "takes no text"),
    "operator_kwargs": (set_args(X, X, target="operator.add", a=1), "no keyword"),
    "higher_order_body": (set_args(True, X, X, {"tuple": [X]}, target="higher_order.cond"), "not a graph"),
    "higher_order_few": (set_args(True, target="higher_order.cond"), "more than 2"),
    "tensor_unknown": (lambda d: node_of(d, "get_attr").update(target="part.ghost"), "no tensor"),
    "tensor_traversal": (lambda d: node_of(d, "get_attr").update(target="../../etc/passwd"), "refused"),
    "tensor_quote": (lambda d: node_of(d, "get_attr").update(target='a"), print("'), "refused"),
    "tensor_dunder": (lambda d: node_of(d, "get_attr").update(target="part.__class__"), "refused"),
    "tensor_method": (lambda d: node_of(d, "get_attr").update(target="forward"), "refused"),
    "tensor_dots": (lambda d: node_of(d, "get_attr").update(target="part..weight"), "refused"),
    "tensor_shape": (
        lambda d: node_of(d, "get_attr", "weight").update(value={"tensor": FLOATS | {"shape": [4, 4]}}),
        "the graph was made for",
    ),
    "tensor_undescribed": (lambda d: node_of(d, "get_attr").pop("value"), "describe the tensor"),
    "output_missing": (lambda d: d["nodes"].pop(), "one last node"),
    "output_early": (lambda d: d["nodes"].insert(0, d["nodes"].pop()), "no earlier node|one last node"),
    "no_nodes": (lambda d: d.update(nodes=[]), "empty"),
    "nodes_not_list": (lambda d: d.update(nodes={"0": {}}), "list of nodes"),
    "node_not_object": (lambda d: d["nodes"].insert(0, 7), "malformed"),
    "graphs_not_object": (lambda d: d.update(graphs=[]), "not an object"),
    "graph_malformed": (lambda d: d.update(graphs={"body": {}}), "malformed"),
    "graph_unsafe_name": (lambda d: d.update(graphs={"a/b": {"nodes": [], "graphs": {}}}), "malformed"),
    "symbols_not_object": (lambda d: d.update(symbols=[]), "not an object"),
    "symbol_name": (lambda d: d.update(symbols={"os": {"hint": 2, "min": 2, "max": 3}}), "malformed"),
    "symbol_hint": (lambda d: d.update(symbols={"s0": {"hint": 9, "min": 2, "max": 3}}), "outside"),
    "symbol_text": (lambda d: d.update(symbols={"s0": {"hint": "2", "min": 2, "max": 3}}), "not an integer"),
    "code_in_shape": (
        set_value({"tensor": FLOATS | {"shape": ["__import__('os').system('true')", 4]}}),
        "not a shape expression",
    ),
    "code_in_size": (set_value({"int": "[].__class__"}), "not a shape expression"),
    "unknown_symbol": (set_value({"int": "s987654"}), "unknown symbol"),
    "zero_division": (set_value({"int": "1 // 0"}), "divides by zero"),
    "negative_size": (set_value({"tensor": FLOATS | {"shape": [-3, 4]}}), "negative size"),
    "huge_size": (set_value({"tensor": FLOATS | {"shape": [2**62, 2**62]}}), "impossible tensor"),
    "negative_stride": (set_value({"tensor": FLOATS | {"shape": [2, 4], "stride": [-1, 1]}}), "negative"),
    "integer_gradient": (
        set_value({"tensor": {**FLOATS, "shape": [2, 4], "dtype": "int64", "requires_grad": True}}),
        "impossible tensor",
    ),
    "unlike_ranks": (set_value({"tensor": FLOATS | {"shape": [2]}}), "unlike numbers"),
    "value_kind": (set_value({"pickle": "gASV"}), "unknown kind of value"),
    "value_deep": (set_value({"list": [{"list": [{"list": [{"list": [{"list": [{"list": [
        {"list": [{"list": [{"list": [{"int": 1}]}]}]}]}]}]}]}]}]}), "not the description"),
    "module_index": (lambda d: node_of(d, "call_function").update(module=10**6), "no entry"),
    "module_negative": (lambda d: node_of(d, "call_function").update(module=-1), "no entry"),
    "modules_malformed": (lambda d: d.update(modules=[[["a", "b"]]]), "malformed"),
    "sources_malformed": (lambda d: d.update(sources=[7]), "not a text"),
    "source_boolean": (lambda d: node_of(d, "call_function").update(source=True), "no entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_spoiled_graphs_are_refused(name: str) -> None:
    change, reason = HOSTILE[name]
    data = small()
    change(data)
    with pytest.raises(LoadError, match=reason):
        load(data)


@pytest.mark.parametrize("data", [None, [], "graph", 3, {}, {"version": 1}])
def test_non_graphs_are_refused(data: Any) -> None:
    with pytest.raises(LoadError, match="not a graph"):
        load(data)


def test_texts_of_the_file_never_become_code(tmp_path: Path) -> None:
    """Stack traces, module paths and provenance are data: none of it is in the source that fx compiles."""
    marker = tmp_path / "ran"
    code = f"\nopen({str(marker)!r}, 'w').close()\n"
    data = small()
    data["sources"] = [f'File "a", line 1, in forward{code}' for _ in data["sources"]]
    data["modules"] = [[[code, code, code]] for _ in data["modules"]]
    node_of(data, "call_function")["rewriter"] = {"rule": code}
    module = load(data)
    module(torch.ones(3, 4))
    module.recompile()
    assert not marker.exists()
    assert "open(" not in module.code
    assert compile(module.print_readable(print_output=False), "readable", "exec")
    assert not marker.exists()


def test_provenance_survives() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    module = captured(One(), {"x": torch.zeros(2)}, None)
    node = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[0]
    node.meta["custom"] = {"rewriter": {"rule": "fuse", "from": ["a", "b"], "ratio": 0.5}}
    _, again = through_text(module)
    loaded = again.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[0]
    assert loaded.meta["custom"] == node.meta["custom"]
    node.meta["custom"] = {"rewriter": {"tensor": torch.zeros(1)}}
    with pytest.raises(ExportError, match=r"node 'add': .*not JSON"):
        graph_to_json(module)


def unsavable(op: str, target: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.create_node(op, target, (x, *args))])
    return fx.GraphModule({"relu": nn.ReLU()}, graph)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (unsavable("call_module", "relu"), "call_module nodes"),
        (unsavable("call_method", "relu"), "call_method nodes"),
        (unsavable("call_function", print), "not on the list"),
        (unsavable("call_function", torch.relu), "not on the list"),
        (unsavable("call_function", torch.ops.aten.resize_.default, [3]), "more than compute"),
        (unsavable("call_function", torch.ops.aten.add.Tensor, ...), "type ellipsis"),
        (unsavable("call_function", torch.ops.aten.add.Tensor, "text"), "not a text"),
        (unsavable("call_function", torch.ops.aten.add.Tensor, 2**80), "beyond 64 bits"),
        (unsavable("call_function", torch.ops.aten.add.Tensor, 1 + 2j), "type complex"),
    ],
)
def test_unsavable_graphs_name_the_node(module: fx.GraphModule, reason: str) -> None:
    with pytest.raises(ExportError, match=rf"node '\w+': .*{reason}"):
        graph_to_json(module)


def test_operator_names_round_trip() -> None:
    operators = [
        torch.ops.aten.linear.default, torch.ops.aten.add.Tensor, torch.ops.aten.__and__.Tensor,
        torch.ops.aten.max.dim, torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_size.int,
        torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.index_put_.default,
        operator.getitem, operator.floordiv, torch.sym_max, torch.sym_float,
        torch.ops.higher_order.cond, torch.ops.higher_order.wrap_with_autocast,
    ]  # fmt: skip
    for target in operators:
        assert lookup(spell(target)) is target


def test_every_project_operator_can_be_saved() -> None:
    """`lookup` imports the kernels by itself; each registered operator is found under its name."""
    with pytest.raises(LoadError):
        lookup("rewriter.no_such_operator.default")
    from rewriter.kernels.spec import REGISTRY

    assert REGISTRY
    for overload in REGISTRY:
        assert lookup(spell(overload)) is overload


@pytest.mark.parametrize("name", ["weight", "a.b", "layers.0.q-proj.weight", "_orig_mod.x", "_constants.t_0"])
def test_names_of_tensors(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", ".a", "a..b", "a/b", "/a", "..", "a b", "a\n", "__class__", "a.__dict__", "forward",
     "a.half",
     "graph", "_parameters", 'a"b', "a'", "ä", "x" * 600, "-a", None, 3],
)  # fmt: skip
def test_unsafe_names_of_tensors(name: Any) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize("name", ["torch", "print", "inf", "device"])
def test_names_that_fx_keeps_for_itself_are_harmless(name: str) -> None:
    data = json.loads(small_text().replace('"x"', json.dumps(name)))
    assert load(data)(torch.ones(3, 4))[0].shape == (6, 3)
