# SPDX-License-Identifier: Apache-2.0
"""The stored folder: exact values, few bytes, whole or not at all, and nothing from it is ever run."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim

from rewriter import jsonfile, storage
from rewriter.errors import ExportError, LoadError
from rewriter.graphio import graph_to_json
from rewriter.narrow import fits_float16
from rewriter.storage import read, stored_bytes, write

FILES = ("manifest.json", "model.safetensors", "graph.json", "plan.json")
GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


class Tiny(nn.Module):
    """y = x Wᵀ + b, twice, the second time by the tied name; one buffer, one lifted constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.arange(4, dtype=torch.float32) / 3, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.offset).view(-1)


@functools.cache
def tiny() -> tuple[Tiny, fx.GraphModule, str]:
    torch.manual_seed(0)
    model = Tiny().eval()
    program = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes={"x": {0: Dim.AUTO}}, strict=False)
    module = program.module(check_guards=False)
    graph = module.graph
    output = graph.output_node()
    output.args = (list(output.args[0]),)
    graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(module, graph)
    return model, module, json.dumps(graph_to_json(module))


def contents() -> dict[str, Any]:
    """Arguments of `write` for the tiny model."""
    model, _, graph = tiny()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    program = {
        "key": ["eval", "float32"],
        "call": {"tuple": [{"tuple": [{"tensor": 0}]}, {"dict": {}}]},
        "result": {"tensor": 0},
        "graph": json.loads(graph),
    }
    return {
        "tensors": parameters | dict(model.named_buffers()),
        "parameters": parameters.keys(),
        "persistent": frozenset[str](),
        "programs": [program],
        "plan": {"version": 1, "sites": []},
        "extra": {"class": "Tiny"},
    }


def write_tiny(path: Path, **changes: Any) -> Path:
    return write(path, **(contents() | changes))


@functools.cache
def saved() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="saved")
    atexit.register(folder.cleanup)
    return write_tiny(Path(folder.name) / "out")


def copy_of_save(path: Path) -> Path:
    """A save to damage; copying is quicker than writing."""
    shutil.copytree(saved(), path)
    return path


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- round trip
# ------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    _, module, _ = tiny()
    given_contents = contents()
    folder = write_tiny(tmp_path / "out")
    assert sorted(os.listdir(folder)) == sorted(FILES)
    stored = read(folder)
    assert stored.tensors.keys() == given_contents["tensors"].keys()
    for name, tensor in given_contents["tensors"].items():
        assert (stored.tensors[name].dtype, stored.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(stored.tensors[name]) == bits(tensor)
        assert isinstance(stored.tensors[name], nn.Parameter) == isinstance(tensor, nn.Parameter)
        assert stored.tensors[name].requires_grad == tensor.requires_grad
    assert stored.parameters == given_contents["parameters"]
    assert stored.persistent == stored.parameters
    assert (stored.plan, stored.extra) == (given_contents["plan"], given_contents["extra"])
    (program,) = stored.programs
    assert program.key == ["eval", "float32"]
    x = torch.randn(5, 4)
    assert torch.equal(program.graph_module(x)[0], module(x)[0])


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    assert "first.weight" in held and "second.weight" not in held
    stored = read(folder)
    assert stored.aliases == {"first.weight": ("first.weight", "second.weight")}
    assert stored.tensors["first.weight"] is stored.tensors["second.weight"]
    parameter = stored.programs[0].graph_module.get_parameter("first.weight")
    assert parameter is stored.tensors["first.weight"]


def test_parameter_and_buffer_of_one_memory(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3))
    tensors = {"view": weight.data, "weight": weight}
    stored = read(write_tiny(tmp_path / "a", tensors=tensors, parameters={"weight"}, programs=[]))
    assert stored.aliases == {"weight": ("weight", "view")}
    assert isinstance(stored.tensors["weight"], nn.Parameter) and not stored.tensors["view"].requires_grad
    with torch.no_grad():
        stored.tensors["weight"].fill_(7)
    assert stored.tensors["view"].tolist() == [7, 7, 7]


def test_loaded_tensors_are_independent_of_the_file(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out")
    stored = read(folder)
    before = bits(stored.tensors["first.weight"])
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * os.path.getsize(folder / "model.safetensors"))
    assert bits(stored.tensors["first.weight"]) == before


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64",
                                   "int8",
                                   "uint8", "bool", "complex64", "uint16"])  # fmt: skip
def test_dtypes_and_layouts(tmp_path: Path, dtype: str) -> None:
    base = torch.randn(4, 6).mul(50).to(getattr(torch, dtype))
    tensors = {
        "plain": base, "transposed": base.clone().t(), "strided": base.clone()[:, ::2],
        "expanded": base.clone()[:1].expand(5, 6), "scalar": base.clone()[0, 0],
        "empty": base.new_empty((0, 3)),
        "nothing": base.new_empty((0, 3)),
    }  # fmt: skip
    stored = read(write_tiny(tmp_path / "a", tensors=tensors, parameters=frozenset(), programs=[]))
    assert stored.aliases == {}
    for name, tensor in tensors.items():
        assert stored.tensors[name].dtype == tensor.dtype and stored.tensors[name].shape == tensor.shape
        assert bits(stored.tensors[name]) == bits(tensor), name


def test_lazy_clones_are_not_tied_and_keep_sharing(tmp_path: Path) -> None:
    weight = torch.randn(64)
    tensors = {"a": weight, "b": torch._lazy_clone(weight)}
    stored = read(write_tiny(tmp_path / "a", tensors=tensors, parameters=frozenset(), programs=[]))
    assert stored.aliases == {} and stored.tensors["a"].data_ptr() != stored.tensors["b"].data_ptr()
    assert torch._C._is_cow_tensor(tensors["b"])


def test_constants_belong_to_their_program(tmp_path: Path) -> None:
    class Plus(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("value", torch.tensor(value))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value

    programs = []
    for value in (1.5, 2.5):
        module = torch.export.export(Plus(value), (torch.zeros(2),), strict=False).module(check_guards=False)
        output = module.graph.output_node()
        output.args = (list(output.args[0]),)
        programs.append(
            {
                "key": value,
                "call": {"tuple": [{"tuple": [{"tensor": 0}]}, {"dict": {}}]},
                "result": {"tensor": 0},
                "graph": graph_to_json(module),
                "constants": {"value": torch.tensor(value)},
            }
        )
    stored = read(write_tiny(tmp_path / "a", programs=programs))
    assert [float(p.graph_module(torch.zeros(2))[0][0]) for p in stored.programs] == [1.5, 2.5]
    assert "value" not in stored.tensors


# --- bytes
# -----------------------------------------------------------------------------------------------------


def halves() -> st.SearchStrategy[float]:
    """Half-precision numbers by their bits, subnormals and both zeros among them."""
    patterns = st.integers(0, 2**16 - 1).filter(lambda b: (b >> 10) & 31 != 31)
    return patterns.map(lambda b: struct.unpack("<e", struct.pack("<H", b))[0])


@settings(deadline=None, max_examples=50)
@given(st.lists(halves(), max_size=20), st.sampled_from([torch.float32, torch.float64]))
def test_half_precision_numbers_take_two_bytes_and_keep_every_bit(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    assert fits_float16(tensor)
    assert stored_bytes(tensor) == 2 * len(values)
    assert bits(tensor.half().to(dtype)) == bits(tensor)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_narrowing_is_exactly_numpys_round_trip(values: list[float]) -> None:
    wide = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lossless = bool(np.isfinite(half).all()) and half.astype(np.float32).tobytes() == wide.tobytes()
    assert fits_float16(torch.from_numpy(wide)) == lossless


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 65520.0, 1e-9, 1 / 3, 2.0**-25])
def test_one_value_that_does_not_fit_keeps_the_tensor_wide(value: float) -> None:
    tensor = torch.ones(1000)
    tensor[777] = value
    assert stored_bytes(tensor) == 4000
    assert stored_bytes(tensor.double()) == 8000


def test_narrowed_tensors_are_half_in_the_file_and_negative_zero_survives(tmp_path: Path) -> None:
    tensors = {"scale": torch.tensor([0.5, -0.0, 2.0**-24]), "wide": torch.tensor([0.1])}
    folder = write_tiny(tmp_path / "a", tensors=tensors, parameters=frozenset(), programs=[])
    held = safetensors.torch.load_file(folder / "model.safetensors")
    assert (held["scale"].dtype, held["wide"].dtype) == (torch.float16, torch.float32)
    stored = read(folder)
    assert all(bits(stored.tensors[name]) == bits(tensor) for name, tensor in tensors.items())


def test_stored_bytes_is_the_size_of_the_data(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(17, 3), "b": torch.ones(5, 5), "c": torch.zeros(9, dtype=torch.uint8)}
    folder = write_tiny(tmp_path / "a", tensors=tensors, parameters=frozenset(), programs=[])
    content = (folder / "model.safetensors").read_bytes()
    data = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert data == sum(map(stored_bytes, tensors.values())) == 17 * 3 * 4 + 25 * 2 + 9


# --- writing
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("step", range(5))
def test_interrupted_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], step: int
) -> None:
    folder = write_tiny(tmp_path / "out")
    before = {name: (folder / name).read_bytes() for name in FILES}
    steps = [(storage, "write_tensors"), (jsonfile, "write"), (jsonfile, "digest")]
    calls = 0
    for module, name in steps:
        original = getattr(module, name)

        def counted(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(*args, **kwargs)
            if calls == step + 1:
                raise failure
            return result

        monkeypatch.setattr(module, name, counted)
    with pytest.raises(failure):
        write_tiny(folder, plan={"other": True})
    monkeypatch.undo()
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert os.listdir(tmp_path) == ["out"]
    assert read(folder).plan == contents()["plan"]


def test_saving_again_replaces_the_save(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out")
    write_tiny(folder, plan={"second": 2})
    assert read(folder).plan == {"second": 2}


@pytest.mark.parametrize("guest", ["notes.txt", "manifest.json", "model.safetensors"])
def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path, guest: str) -> None:
    (tmp_path / guest).write_text("{}")
    with pytest.raises(ExportError, match="not written by this function"):
        write_tiny(tmp_path)
    assert os.listdir(tmp_path) == [guest]


def test_a_save_with_a_guest_is_not_replaced(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not written by this function"):
        write_tiny(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def shared() -> dict[str, Tensor]:
    base = torch.randn(8)
    return {"a": base[:5], "b": base[3:]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": {"../evil": torch.ones(1)}}, "cannot be saved; use letters"),
        ({"tensors": {"a": torch.ones(1, device="meta")}}, "no dense values"),
        ({"tensors": {"a": torch.eye(2).to_sparse()}}, "no dense values"),
        ({"tensors": {"a": torch.ones(1, dtype=torch.complex128)}}, "safetensors cannot hold"),
        ({"tensors": {"a": [1.0]}}, "make it a plain tensor"),
        ({"tensors": shared()}, "overlap in memory"),
        ({"tensors": {}, "parameters": {"ghost"}}, "not among the tensors"),
        ({"tensors": {}, "persistent": {"ghost"}}, "not among the tensors"),
        ({"plan": {"a": float("nan")}}, "NaN"),
        ({"extra": {"a": object()}}, "not JSON"),
    ],
)
def test_what_cannot_be_saved_is_told_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    base = {"programs": []} | ({"parameters": frozenset()} if "tensors" in changes else {})
    with pytest.raises(ExportError, match=reason):
        write_tiny(tmp_path / "out", **(base | changes))
    assert os.listdir(tmp_path) == []


def test_views_of_one_storage_that_do_not_overlap_are_fine(tmp_path: Path) -> None:
    base = torch.randn(8)
    tensors = {"a": base[:4], "b": base[4:]}
    stored = read(write_tiny(tmp_path / "a", tensors=tensors, parameters=frozenset(), programs=[]))
    assert torch.equal(torch.cat((stored.tensors["a"], stored.tensors["b"])), base)


def test_a_program_that_does_not_fit_its_tensors_is_not_saved(tmp_path: Path) -> None:
    tensors = contents()["tensors"] | {"first.bias": nn.Parameter(torch.ones(4).half())}
    with pytest.raises(ExportError, match=r"program 0: node 'first_bias': .* made for float32\[4\]"):
        write_tiny(tmp_path / "out", tensors=tensors)
    assert os.listdir(tmp_path) == []


def test_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write_tiny(tmp_path / "file" / "out")


# --- versions
# --------------------------------------------------------------------------------------------------


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a save and make the manifest agree, as an attacker would."""
    path = folder / name
    value = json.loads(path.read_text())
    replaced = change(value)
    path.write_text(json.dumps(value if replaced is None else replaced))
    reseal(folder)


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: jsonfile.digest(folder / name) for name in FILES[1:]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_newer_saves_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "out")
    edit(folder, "manifest.json", lambda m: m.update(version=storage.FORMAT_VERSION + 1))
    with pytest.raises(LoadError, match=r"manifest\.json: written by a newer version"):
        read(folder)


def test_older_saves_are_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "out")

    def rename_plan(documents: storage.Documents) -> storage.Documents:
        documents["plan.json"] = {"migrated": documents["plan.json"]}
        documents["graph.json"]["version"] = 2
        return documents

    monkeypatch.setattr(storage, "FORMAT_VERSION", 2)
    with pytest.raises(LoadError, match="can no longer be read"):
        read(folder)
    monkeypatch.setitem(storage.MIGRATIONS, 1, rename_plan)
    assert read(folder).plan == {"migrated": contents()["plan"]}


def test_every_step_of_the_migration_table_exists() -> None:
    assert set(storage.MIGRATIONS) == set(range(1, storage.FORMAT_VERSION))


def test_golden_save_of_version_1() -> None:
    """Written by the first release (tests/golden/write_golden.py); must load for ever, with these values."""
    stored = read(GOLDEN)
    weight = (torch.arange(12, dtype=torch.float32).view(3, 4) - 5) / 8
    table = torch.tensor([1 / 3, -0.0, 65504.0])
    assert bits(stored.tensors["part.weight"]) == bits(weight)
    assert stored.tensors["head.weight"] is stored.tensors["part.weight"]
    assert bits(stored.tensors["table"]) == bits(table)
    assert stored.aliases == {"part.weight": ("part.weight", "head.weight")}
    assert stored.parameters == {"part.weight", "head.weight", "scale", "codebook"}
    assert stored.persistent == stored.parameters | {"codes", "tokens"}
    assert stored.plan == {"version": 1, "sites": []} and stored.extra == {"note": "golden"}
    (program,) = stored.programs
    signs = torch.tensor([[0.5, -0.5, 0.5, -0.5], [-2.0, -2.0, 2.0, 2.0]])
    rows = torch.tensor([[0.0, 1, 4, 5], [2, 3, 4, 5], [2, 3, 6, 7]])
    for n in (1, 2, 5):
        x = torch.arange(4.0 * n).view(n, 4) - 7
        flat, signed, logits, branch = program.graph_module(x)
        assert torch.equal(flat, (x @ weight.t() * 2 + table).reshape(n * 3))
        assert torch.equal(signed, x @ signs.t())
        assert torch.equal(logits, x @ rows.t())
        assert torch.equal(branch, x + 1 if n == 5 else x - 1)  # the sum is positive from n = 4 on


def test_golden_save_keeps_what_analysis_needs() -> None:
    (program,) = read(GOLDEN).programs
    graph = program.graph_module.graph
    size = graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert isinstance(size, torch.SymInt) and size.node.hint == 2
    linear = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    assert linear.meta["nn_module_stack"] == {"L__self__part": ("part", "torch.nn.modules.linear.Linear")}
    assert "self.part(x)" in linear.meta["stack_trace"]
    assert linear.meta["custom"] == {"rewriter": {"rule": "golden"}}


# --- hostile and damaged
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tenth", range(10))
def test_truncated_files(tmp_path: Path, name: str, tenth: int) -> None:
    folder = copy_of_save(tmp_path / "out")
    path = folder / name
    os.truncate(path, path.stat().st_size * tenth // 10)
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        read(folder)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("tenth", range(10))
def test_truncated_files_with_a_matching_digest(tmp_path: Path, name: str, tenth: int) -> None:
    folder = copy_of_save(tmp_path / "out")
    path = folder / name
    os.truncate(path, path.stat().st_size * tenth // 10)
    reseal(folder)
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        read(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_links_pipes_and_folders(tmp_path: Path, name: str) -> None:
    folder = copy_of_save(tmp_path / "out")
    moved = tmp_path / "moved"
    shutil.move(folder / name, moved)
    with pytest.raises(LoadError, match=rf"{name}: cannot be opened \(No such file"):
        read(folder)
    (folder / name).symlink_to(moved)
    with pytest.raises(LoadError, match=rf"{name}: .*symbolic link"):
        read(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(LoadError, match=rf"{name}: not a regular file"):
        read(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(LoadError, match=rf"{name}: not a regular file"):
        read(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_files_of_two_saves_do_not_mix(tmp_path: Path, name: str) -> None:
    one = copy_of_save(tmp_path / "one")
    tensors = {
        k: nn.Parameter(v * 3) if isinstance(v, nn.Parameter) else v * 3 for k, v in contents()["tensors"].items()
    }
    tensors["second.weight"] = tensors["first.weight"]
    two = write_tiny(tmp_path / "two", plan={"other": 1}, tensors=tensors, programs=contents()["programs"] * 2)
    shutil.copy(two / name, one / name)
    with pytest.raises(LoadError, match=rf"{name}: (damaged|truncated) or of another save"):
        read(one)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_pickles_are_never_opened(tmp_path: Path, name: str, protocol: int | str) -> None:
    folder = copy_of_save(tmp_path / "out")
    marker = tmp_path / "ran"
    if protocol == "torch":
        torch.save({"a": Payload(marker)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Payload(marker), protocol=int(protocol)))
    if name != "manifest.json":
        reseal(folder)
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        read(folder)
    assert not marker.exists()


def test_no_length_of_the_header_makes_our_own_file_a_foreign_one(tmp_path: Path) -> None:
    """A safetensors file starts with that length: one in 32 of them with the byte that pickles start with."""
    starts = set()
    for length in range(1, 257, 8):
        tensors = contents()["tensors"] | {"n" * length: torch.arange(3.0)}
        folder = write_tiny(tmp_path / str(length), tensors=tensors)
        starts.add((folder / "model.safetensors").read_bytes()[0])
        assert torch.equal(read(folder).tensors["n" * length], torch.arange(3.0))
    assert starts == set(range(0, 256, 8))


@pytest.mark.parametrize("start", [b"\x80\x02\0\0", b"PK\x03\x04", b"\x89HDF"])
def test_a_start_is_foreign_unless_it_is_the_length_of_a_header(tmp_path: Path, start: bytes) -> None:
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    ours.write_bytes(start + b"\0\0\0\0{}")
    foreign.write_bytes(start + b"\r\n\x1a\n{}")
    jsonfile.check_digest(ours, jsonfile.digest(ours))
    with pytest.raises(LoadError, match="never opened here"):
        jsonfile.check_digest(foreign, jsonfile.digest(foreign))


def graph_of(document: dict[str, Any]) -> Any:
    return document["programs"][0]["graph"]


def calls_of(document: dict[str, Any]) -> list[Any]:
    return [node for node in graph_of(document)["nodes"] if node["op"] == "call_function"]


HOSTILE_GRAPHS: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "code_in_shape": (
        lambda d, run: graph_of(d)["nodes"][0].update(value={"int": f"__import__('os').system({run!r})"}),
        "not a shape expression",
    ),
    "code_in_name": (
        lambda d, run: calls_of(d)[0].update(name=f"a=__import__('os').system({run!r})"),
        "identifier",
    ),
    "code_in_tensor_name": (
        lambda d, run: graph_of(d)["nodes"][0].update(target=f'a"), __import__("os").system({run!r}), ("'),
        "refused",
    ),
    "code_in_text": (
        lambda d, run: calls_of(d)[0]["args"].append({"text": f"__import__('os').system({run!r})"}),
        "positional|not a text",
    ),
    "os_system": (
        lambda d, run: calls_of(d)[0].update(target="os.system", args=[{"text": run}]),
        "not on the list",
    ),
    "from_file": (
        lambda d, run: calls_of(d)[0].update(target="aten.from_file.default", args=[{"text": run}]),
        "more than compute",
    ),
    "class_attribute": (
        lambda d, run: calls_of(d)[0].update(target="aten.linear.__class__"),
        "not on the list",
    ),
    "traversal": (lambda d, run: graph_of(d)["nodes"][0].update(target="../../../etc/passwd"), "refused"),
    "cycle": (
        lambda d, run: calls_of(d)[0]["args"].__setitem__(0, {"node": calls_of(d)[-1]["name"]}),
        "earlier",
    ),
    "unknown_node": (lambda d, run: calls_of(d)[0]["args"].__setitem__(0, {"node": "ghost"}), "earlier"),
    "newer_graph": (lambda d, run: graph_of(d).update(version=99), "newer version"),
    "newer_document": (lambda d, run: d.update(version=99), "does not fit the manifest"),
    "not_programs": (lambda d, run: d.update(programs={}), "not a list"),
    "no_programs": (lambda d, run: d.update(programs=[]), "constants"),
    "program_keys": (lambda d, run: d["programs"][0].update(code=run), "exactly the keys"),
    "not_an_object": (lambda d, run: ["programs"], "not a list of programs"),
    "call_range": (lambda d, run: d["programs"][0].update(call={"tensor": 1}), "call template"),
    "call_negative": (lambda d, run: d["programs"][0].update(call={"tensor": -1}), "call template"),
    "call_boolean": (lambda d, run: d["programs"][0].update(call={"tensor": False}), "call template"),
    "result_kind": (lambda d, run: d["programs"][0].update(result={"eval": run}), "result template"),
    "result_class": (
        lambda d, run: d["programs"][0].update(result={"object": f"os.system({run!r})", "fields": {}}),
        "result template",
    ),
    "result_deep": (
        lambda d, run: d["programs"][0].update(
            result=functools.reduce(lambda t, _: {"list": [t]}, range(90), {"const": 1})
        ),
        "nested too deeply",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GRAPHS)
def test_hostile_graphs(tmp_path: Path, name: str) -> None:
    change, reason = HOSTILE_GRAPHS[name]
    folder, marker = copy_of_save(tmp_path / "out"), tmp_path / "ran"
    edit(folder, "graph.json", lambda document: change(document, f"touch {marker}"))
    with pytest.raises(LoadError, match=rf"graph\.json: .*({reason})"):
        read(folder)
    assert not marker.exists()


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not_ours": (lambda m: m.update(format="gguf"), "not a manifest"),
    "a_list": (lambda m: [], "not a manifest"),
    "no_version": (lambda m: m.pop("version"), "version"),
    "version_text": (lambda m: m.update(version="1"), "not a positive integer"),
    "version_zero": (lambda m: m.update(version=0), "not a positive integer"),
    "extra_key": (lambda m: m.update(hook="os.system"), "expected the keys"),
    "file_elsewhere": (lambda m: m["files"].update({"../../etc/passwd": m["files"]["plan.json"]}), "exactly"),
    "file_missing": (lambda m: m["files"].pop("plan.json"), "exactly"),
    "digest_malformed": (lambda m: m["files"].update({"plan.json": {"bytes": True, "sha256": "0"}}), "digest"),
    "traversal": (lambda m: m["tensors"].update({"../../x": m["tensors"]["offset"]}), "refused"),
    "absolute": (lambda m: m["tensors"].update({"/etc/passwd": m["tensors"]["offset"]}), "refused"),
    "dunder": (lambda m: m["tensors"].update({"__class__": m["tensors"]["offset"]}), "refused"),
    "method": (lambda m: m["tensors"].update({"forward": m["tensors"]["offset"]}), "refused"),
    "unknown_tensor": (lambda m: m["tensors"].update({"ghost": m["tensors"]["offset"]}), "not in both"),
    "undeclared_tensor": (lambda m: m["tensors"].pop("offset"), "not in both"),
    "wrong_shape": (lambda m: m["tensors"]["offset"].update(shape=[2, 2]), "the manifest says"),
    "negative_shape": (lambda m: m["tensors"]["offset"].update(shape=[-4]), "malformed"),
    "huge_shape": (lambda m: m["tensors"]["offset"].update(shape=[2**60, 2**60]), "the manifest says"),
    "wrong_dtype": (lambda m: m["tensors"]["offset"].update(dtype="float64"), "the manifest says"),
    "unknown_dtype": (lambda m: m["tensors"]["offset"].update(dtype="__class__"), "unknown dtype"),
    "flag": (lambda m: m["tensors"]["offset"].update(parameter=1), "malformed"),
    "integer_gradient": (
        lambda m: m["tensors"]["offset"].update(dtype="int32", requires_grad=True), "cannot require"),
    "record_keys": (lambda m: m["tensors"]["offset"].update(offset=0), "malformed"),
    "tensors_list": (lambda m: m.update(tensors=[]), "must be objects"),
    "constants_object": (lambda m: m.update(constants={}), "must be objects"),
    "constants_name": (lambda m: m.update(constants=[{"../a": m["tensors"]["offset"]}]), "refused"),
    "constants_count": (lambda m: m.update(constants=[]), "constants of 0"),
    "alias_unknown": (lambda m: m["aliases"].update({"first.weight": ["first.weight", "ghost"]}), "unknown"),
    "alias_twice": (lambda m: m["aliases"].update({"offset": ["offset", "second.weight"]}), "named twice"),
    "alias_cycle": (
        lambda m: m["aliases"].update({"second.weight": ["second.weight", "first.weight"]}), "named twice"),
    "alias_shape": (lambda m: m["aliases"].update({"offset": ["offset", "ghost"]}), "unknown"),
    "alias_unlike": (
        lambda m: m.update(aliases={"first.weight": ["first.weight", "first.bias"]}), "differs|not in both"),
    "alias_malformed": (lambda m: m.update(aliases={"first.weight": "second.weight"}), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_hostile_manifests(tmp_path: Path, name: str) -> None:
    change, reason = HOSTILE_MANIFESTS[name]
    folder = copy_of_save(tmp_path / "out")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    replaced = change(manifest)
    path.write_text(json.dumps(replaced if isinstance(replaced, list) else manifest))
    with pytest.raises(LoadError, match=reason):
        read(folder)


@pytest.mark.parametrize("name", ["manifest.json", "graph.json", "plan.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated or not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "a key twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "truncated or not JSON"),
        (b'{"a": "\xff"}', "truncated or not JSON"),
        (b"<html>404</html>", "truncated or not JSON"),
        (b"cos\nsystem\n(S'true'\ntR.", "truncated or not JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    folder = copy_of_save(tmp_path / "out")
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        reseal(folder)
    with pytest.raises(LoadError, match=rf"{name}: .*{reason}"):
        read(folder)


def test_plan_must_be_an_object(tmp_path: Path) -> None:
    folder = copy_of_save(tmp_path / "out")
    edit(folder, "plan.json", lambda plan: [plan])
    with pytest.raises(LoadError, match=r"plan\.json: not a plan"):
        read(folder)


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of_save(tmp_path / "out")
    monkeypatch.setitem(storage._LIMITS, "graph.json", 100)
    with pytest.raises(LoadError, match=r"graph\.json: larger than 100 bytes"):
        read(folder)


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_hostile_safetensors_headers(tmp_path: Path, offset: int) -> None:
    """A header length beyond the file, a header that lies about offsets, garbage instead of a header."""
    folder = copy_of_save(tmp_path / "out")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    if offset == 0:
        content[:8] = (2**63 - 1).to_bytes(8, "little")
    elif offset == 1:
        content = bytearray(bytes(content).replace(b'"data_offsets":[0,', b'"data_offsets":[9,'))
    else:
        content[8:16] = b"\0" * 8
    path.write_bytes(bytes(content))
    reseal(folder)
    with pytest.raises(LoadError, match=r"model\.safetensors: "):
        read(folder)


@pytest.mark.parametrize("what", ["missing", "file"])
def test_a_path_that_is_no_folder(tmp_path: Path, what: str) -> None:
    if what == "file":
        (tmp_path / what).write_text("")
    with pytest.raises(LoadError, match="is not a folder"):
        read(tmp_path / what)


@settings(deadline=None, max_examples=40)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(FILES))
def test_a_flipped_bit_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int, name: str
) -> None:
    """Digests find it in the three files; in the manifest it is found, or changes no value."""
    folder = copy_of_save(tmp_path_factory.mktemp("flip") / "out")
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(bytes(content))
    if name != "manifest.json":
        with pytest.raises(LoadError, match=name.replace(".", r"\.")):
            read(folder)
        return
    try:
        stored = read(folder)
    except LoadError:
        return
    expected = contents()["tensors"]
    assert all(bits(stored.tensors[k]) == bits(v) for k, v in expected.items())
