# SPDX-License-Identifier: Apache-2.0
"""What an exported file holds: packed codes, names, versions, axes; a refused export changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_sites import (
    BcqEmbedding,
    BcqLinear,
    PotEmbedding,
    PotLinear,
    ProductHead,
    TiersHead,
    half_values,
    ops,
    relative_error,
    run,
    session,
)
from torch import Tensor, nn

from rewriter.capturing import capture
from rewriter.codegen.onnx_export import ExportResult, export_program
from rewriter.errors import ExportError
from rewriter.program import Program


def write(program: Program, path: Path, **options: object) -> ExportResult:
    names = {"input_names": program.input_names(), "output_names": program.output_names()}
    return export_program(program.graph_module, path, program.example, **{**names, **options})  # type: ignore[arg-type]


def initialisers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}


class EverySite(nn.Module):
    """Each operator in each combination of optional inputs, all on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([BcqEmbedding(21, 40), BcqEmbedding(21, 40, shift=False), PotEmbedding(21, 40)])
        self.mix = nn.Linear(21, 21)
        choices = (False, True)
        self.sites = nn.ModuleList(
            [
                *(BcqLinear(21, 11, shift=shift, bias=bias) for shift in choices for bias in choices),
                *(PotLinear(21, 11, bias=bias) for bias in choices),
                *(TiersHead(21, 11, codes=5, bias=bias) for bias in choices),
                *(ProductHead(21, 11, bias=bias) for bias in choices),
            ]
        )

    def forward(self, ids: Tensor) -> list[Tensor]:
        rows = [table(ids) for table in self.tables]
        x = self.mix(torch.stack(rows).sum(0))
        return [*rows, *(site(x) for site in self.sites)]


class Net(nn.Module):
    """A packed embedding, a dense layer, a packed layer and a packed head, two of them in submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = BcqEmbedding(48, 64, bits=4)
        self.block = nn.ModuleDict({"up": nn.Linear(48, 64), "down": BcqLinear(64, 48, bits=4)})
        self.head = ProductHead(48, 64, codes=32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block["down"](torch.relu(self.block["up"](self.embed(ids)))))


@pytest.fixture(scope="module")
def net() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randint(0, 64, (2, 5)),))


@pytest.fixture(scope="module")
def exported(net: Program, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The net at the default settings, for the tests that only look at the file."""
    return write(net, tmp_path_factory.mktemp("exported") / "net.onnx")


# -- operators ---------------------------------------------------------------------------------------------------


def test_every_operator_at_other_sizes(tmp_path: Path) -> None:
    module = EverySite()
    result = write(capture(module, (torch.randint(0, 40, (2, 5)),)), tmp_path / "m.onnx")
    called = [(n.op_type, n.overload) for n in onnx.load(str(result.path)).graph.node if n.domain == "ai.rewriter"]
    assert sorted(called) == sorted(
        [("BcqEmbedding", "shift"), ("BcqEmbedding", ""), ("PotEmbedding", "")]
        + [("BcqLinear", overload) for overload in ("", "bias", "shift", "shift_bias")]
        + [(name, overload) for name in ("PotLinear", "VqLogitsTiers", "VqLogitsProduct") for overload in ("", "bias")]
    )
    assert result.functions == tuple(sorted({name for name, _ in called}))
    loaded = session(result.path)
    for batch, sequence in ((2, 5), (4, 9), (1, 1)):
        ids = torch.randint(0, 40, (batch, sequence))
        for found, expected in zip(run(loaded, ids=ids), module(ids), strict=True):
            assert relative_error(found, expected) <= 2e-6


@pytest.mark.parametrize("opset", range(20, 26))
def test_every_opset_is_stamped_and_runs(opset: int, net: Program, tmp_path: Path) -> None:
    result = write(net, tmp_path / "m.onnx", opset=opset)
    model = onnx.load(str(result.path))
    assert {(o.domain, o.version) for o in model.opset_import} == {("", opset), ("ai.rewriter", 1)}
    assert all(o.version == opset for f in model.functions for o in f.opset_import if not o.domain)
    assert result.opset == opset and model.ir_version == result.ir_version <= 13
    ids = torch.randint(0, 64, (3, 7))
    (found,) = run(result.path, ids=ids)
    assert relative_error(found, net.run(ids)[0]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_types(dtype: torch.dtype, tmp_path: Path) -> None:
    module = nn.Sequential(BcqEmbedding(32, 64), PotLinear(32, 48), BcqLinear(48, 32), TiersHead(32, 64, 20)).to(dtype)
    ids = torch.randint(0, 64, (2, 5))
    result = write(capture(module, (ids,)), tmp_path / "m.onnx")
    (found,) = run(result.path, **{result.inputs[0].name: ids[:1]})
    assert found.dtype == (np.float16 if dtype is torch.float16 else np.float64)
    # float16: half a unit in the last place at each of the three layers; float64: decoded and multiplied as such.
    assert relative_error(found, module(ids[:1])) <= (3 * 2**-11 if dtype is torch.float16 else 1e-12)


def test_what_has_no_function_is_exported_as_its_reference(tmp_path: Path) -> None:
    """An operator without one; a product head alone, whose input may have any width within the last group."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiers, self.product = TiersHead(21, 11, 5), ProductHead(21, 11)

        def forward(self, h: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
            return ops.vq_tiers_logsumexp(h, self.tiers.codebook, self.tiers.code_of, None), self.product(free)

    module, h = Heads(), torch.randn(3, 21)
    result = write(capture(module, (h, torch.randn(4, 5, 22))), tmp_path / "m.onnx")
    assert result.functions == ()
    assert initialisers(result.path)["product.codes"].data_type == TensorProto.UINT8
    for free in (torch.randn(2, 1, 21), torch.randn(1, 5, 24)):
        found = run(result.path, **{p.name: t for p, t in zip(result.inputs, (h, free), strict=True)})
        for one, other in zip(found, module(h, free), strict=True):
            assert relative_error(one, other) <= 2e-6


def test_operators_inside_control_flow(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.dense = BcqLinear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.site(y), lambda y: self.dense(y) - 1, (x,))

    module = Branch()
    result = write(capture(module, (torch.randn(3, 20),)), tmp_path / "m.onnx")
    assert result.functions == ("BcqLinear",)
    for x in (torch.ones(5, 20), -torch.ones(1, 20)):
        assert relative_error(run(result.path, **{result.inputs[0].name: x})[0], module(x)) <= 2e-6


# -- what is stored ----------------------------------------------------------------------------------------------


def test_codes_stay_packed_bytes(net: Program, exported: ExportResult) -> None:
    stored = initialisers(exported.path)
    packed = [n for n in net.tensors() if n.rpartition(".")[2] in ("weight_codes", "weight_shift", "codes")]
    assert len(packed) == 5
    for name in packed:
        assert stored[name].data_type == TensorProto.UINT8
        assert len(numpy_helper.to_array(stored[name]).tobytes()) == net.tensor(name).numel()
        assert np.array_equal(numpy_helper.to_array(stored[name]), net.tensor(name).numpy())
    weights = 64 * 48 + 48 * 64  # embedding and down layer, at four bits
    assert sum(net.tensor(n).numel() for n in packed if n.endswith("weight_codes")) == weights // 2


def test_narrowing_is_lossless_and_optional(net: Program, exported: ExportResult, tmp_path: Path) -> None:
    unnarrowed = write(net, tmp_path / "wide.onnx", narrow=False)
    narrow, wide = initialisers(exported.path), initialisers(unnarrowed.path)
    for name in ("embed.weight_scale", "block.down.weight_scale", "head.codebook"):
        assert narrow[name].data_type == TensorProto.FLOAT16 and wide[name].data_type == TensorProto.FLOAT
        assert np.array_equal(numpy_helper.to_array(narrow[name]).astype(np.float32), net.tensor(name).detach().numpy())
    assert narrow["block.up.weight"].data_type == TensorProto.FLOAT  # its values need all their bits
    ids = torch.randint(0, 64, (2, 5))
    one, other = (run(result.path, ids=ids)[0] for result in (exported, unnarrowed))
    assert np.array_equal(one, other)


def test_dense_half_precision_checkpoint_is_not_doubled(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    for parameter in module.parameters():
        parameter.data = half_values(*parameter.shape)
    program = capture(module, (torch.randn(3, 128),))
    result = write(program, tmp_path / "m.onnx")
    stored = initialisers(result.path)
    assert {stored[n].data_type for n in ("0.weight", "2.weight")} == {TensorProto.FLOAT16}
    assert stored["0.bias"].data_type == TensorProto.FLOAT  # too small for a cast to pay
    assert result.bytes < 2 * sum(p.numel() for p in module.parameters()) + 6000
    x = torch.randn(5, 128)
    (found,) = run(result.path, **{result.inputs[0].name: x})
    assert relative_error(found, module(x)) <= 2e-6


def test_negative_zero_infinity_and_large_values(tmp_path: Path) -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, odd in (("zero", -0.0), ("large", 1e5), ("infinite", float("-inf"))):
                self.register_buffer(name, torch.ones(64, 32))
                self.get_buffer(name)[3, 4] = odd

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.maximum(x, table) for table in (self.zero, self.large, self.infinite))

    module = Tables()
    result = write(capture(module, (torch.randn(2, 64, 32),)), tmp_path / "m.onnx", output_names=["a", "b", "c"])
    kept = {name: tensor.data_type for name, tensor in initialisers(result.path).items()}
    assert kept == {"zero": TensorProto.FLOAT16, "large": TensorProto.FLOAT, "infinite": TensorProto.FLOAT}
    x = torch.full((1, 64, 32), -torch.inf)
    for found, expected in zip(run(result.path, **{result.inputs[0].name: x}), module(x), strict=True):
        assert np.array_equal(found.view(np.int32), expected.numpy().view(np.int32))


def test_runtime_folds_layers_and_keeps_tables_packed(net: Program, exported: ExportResult, tmp_path: Path) -> None:
    """What ONNX Runtime makes of the file: one MatMul per packed layer or head, the embedding still in bytes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    assert [node.op_type for node in graph.node].count("MatMul") == 3
    packed = {t.name for t in graph.initializer if t.data_type == TensorProto.UINT8 and numel(t) > 16}
    assert packed == {"embed.weight_codes", "embed.weight_shift"}


def numel(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims))


def test_names_lead_back_to_the_module(net: Program, exported: ExportResult) -> None:
    model, stored = onnx.load(str(exported.path)), initialisers(exported.path)
    assert {n for n in stored if "." in n} == set(net.tensors())
    paths = {n.name: {p.key: p.value for p in n.metadata_props} for n in model.graph.node}
    assert paths["embed/BcqEmbedding"] == {"rewriter.path": "embed"}
    assert paths["block/down/BcqLinear"] == {"rewriter.path": "block.down"}
    assert any(p == {"rewriter.path": "block.up"} for p in paths.values())
    assert len(paths) == len(model.graph.node)  # names are unique
    content = exported.path.read_bytes()
    assert b"site-packages" not in content and str(Path.cwd()).encode() not in content


def test_ports(net: Program, tmp_path: Path) -> None:
    result = write(net, tmp_path / "m.onnx", input_names=["tokens"], output_names=["scores"])
    assert [(p.name, p.dtype, p.shape) for p in result.inputs] == [("tokens", "INT64", ("batch", "sequence"))]
    assert [(p.name, p.dtype, p.shape) for p in result.outputs] == [("scores", "FLOAT", ("batch", "sequence", 64))]
    assert result.bytes == result.path.stat().st_size and not result.external_data


def test_static_capture_gives_static_axes(tmp_path: Path) -> None:
    program = capture(BcqLinear(21, 11), (torch.randn(2, 5, 21),), dynamic_shapes="static")
    result = write(program, tmp_path / "m.onnx")
    assert result.inputs[0].shape == (2, 5, 21) and result.outputs[0].shape == (2, 5, 11)


def test_example_of_size_one_stays_dynamic(net: Program, tmp_path: Path) -> None:
    result = export_program(net.graph_module, tmp_path / "m.onnx", [torch.zeros(1, 1, dtype=torch.int64)])
    assert result.inputs[0].shape == ("batch", "sequence")
    ids = torch.randint(0, 64, (3, 4))
    assert relative_error(run(result.path, **{result.inputs[0].name: ids})[0], net.run(ids)[0]) <= 2e-6


def test_lifted_constants_repeated_outputs_and_passed_inputs(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            z = x * torch.tensor([1.0, 2.0, 3.0])
            return z, z, y, z + y.sum()

    module = Odd()
    program = capture(module, (torch.randn(4, 3), torch.randn(2)))
    result = write(program, tmp_path / "m.onnx", output_names=["a", "b", "c", "d"])
    x, y = torch.randn(5, 3), torch.randn(7)
    found = run(result.path, **{p.name: t for p, t in zip(result.inputs, (x, y), strict=True)})
    assert all(relative_error(f, e) <= 1e-6 for f, e in zip(found, module(x, y), strict=True))


class LearnedBias(nn.Module):
    """Attention with a trained bias beside the mask; torch picks its kernel by what needs gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.bias = nn.Linear(16, 16), nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.projection(x).view(x.shape[0], 6, 2, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, self.bias + mask)
        return self.projection(y.transpose(1, 2).flatten(2))


def test_attention_with_a_trained_bias(tmp_path: Path) -> None:
    model, x, mask = LearnedBias().eval(), torch.randn(2, 6, 16), torch.zeros(2, 1, 1, 6)
    program = capture(model, (x, mask))
    path = tmp_path / "bias.onnx"
    write(program, path)
    (result,) = run(path, x=x, mask=mask)
    np.testing.assert_allclose(result, model(x, mask).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_exporting_changes_nothing_and_is_deterministic(net: Program, exported: ExportResult, tmp_path: Path) -> None:
    code = net.graph_module.code
    tensors = {name: (tensor, tensor.clone()) for name, tensor in net.tensors().items()}
    marks = [vars(tensor).copy() for tensor in net.example]
    again = write(net, tmp_path / "m.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()
    assert net.graph_module.code == code
    assert all(net.tensor(n) is t and torch.equal(t, copy) for n, (t, copy) in tensors.items())
    assert [vars(tensor) for tensor in net.example] == marks


# -- external data -----------------------------------------------------------------------------------------------


def test_external_data(net: Program, tmp_path: Path) -> None:
    result = write(net, tmp_path / "m.onnx", external_data=True)
    data = tmp_path / "m.onnx.data"
    assert result.external_data and sorted(tmp_path.iterdir()) == [result.path, data]
    assert result.bytes == result.path.stat().st_size + data.stat().st_size
    onnx.checker.check_model(str(result.path), full_check=True)
    ids = torch.randint(0, 64, (3, 7))
    assert relative_error(run(result.path, ids=ids)[0], net.run(ids)[0]) <= 2e-6


def test_external_data_is_chosen_by_size(net: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.codegen.onnx_export._MAX_WEIGHTS", 1000)
    assert write(net, tmp_path / "m.onnx").external_data
    with pytest.raises(ExportError, match="more than one ONNX file holds"):
        write(net, tmp_path / "n.onnx", external_data=False)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [0, 17, 19, 26, 28, True, "24", None])
def test_other_opsets_are_refused(opset: object, net: Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="choose one of 20, 21, 22, 23, 24, 25"):
        write(net, tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_unwritable_path_is_refused_before_any_work(
    net: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("rewriter.codegen.onnx_export.trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(ExportError, match="cannot write"):
        write(net, tmp_path / "file" / "m.onnx")


def test_wrong_example_and_names(net: Program, tmp_path: Path) -> None:
    path, example = tmp_path / "m.onnx", torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ExportError, match="takes 1 tensors, the example has 2"):
        export_program(net.graph_module, path, [example, example])
    with pytest.raises(ExportError, match="the example gives"):
        export_program(net.graph_module, path, [example.float()])
    with pytest.raises(ExportError, match="2 input names for 1 inputs"):
        export_program(net.graph_module, path, [example], input_names=["a", "b"])
    with pytest.raises(ExportError, match="repeat"):
        export_program(net.graph_module, path, [example], input_names=["a"], output_names=["a"])


@torch.library.custom_op("onnx_export_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.sin()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operator_unknown_to_onnx_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return opaque(x) + 1

    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"onnx_export_test\.opaque"):
        write(capture(Foreign(), (torch.randn(3, 4),)), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("external", [False, True])
def test_interrupt_leaves_no_half_written_file(
    external: bool, net: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr("rewriter.codegen.onnx_export._check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(net, path, external_data=external)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_checker_refusal_is_reported(net: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(model: onnx_ir.Model) -> None:
        next(node for node in model.graph if not node.domain).op_type = "NoSuchOperator"

    monkeypatch.setattr("rewriter.codegen.onnx_model.narrow", corrupt)
    with pytest.raises(ExportError, match=r"checker refuses.*NoSuchOperator"):
        write(net, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
