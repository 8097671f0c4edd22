# SPDX-License-Identifier: Apache-2.0
"""What is emitted for four models: which neighbours are fused where, the same results, readable and repeatable files."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emitted_chains import arguments_of, complaint
from interpreter import interpreting
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

import rewriter
from rewriter.codegen import ahead_of_time
from rewriter.codegen.emitting import Emission, emit
from rewriter.kernels.emitted.loading import load
from rewriter.kernels.launching import Unsupported
from rewriter.program import Program

VOCABULARY, WIDTH = 61, 32
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 48}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def gpt2(layers: int = 2) -> nn.Module:
    sizes = {"n_positions": 16, "n_embd": WIDTH, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ENDS))


def llama(layers: int = 2) -> nn.Module:
    sizes = LAYERS | {"num_hidden_layers": layers, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **ENDS))


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **LAYERS))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **LAYERS))


# Model -> what is fused at its sites; the layers are alike.
SITES = {
    "gpt2": {
        "transformer.h.*.attn.c_proj": "add",
        "transformer.h.*.mlp.c_fc": "mul pow mul add mul tanh add mul",
        "transformer.h.*.mlp.c_proj": "add",
    },
    "llama": {
        "model.layers.*.self_attn.qkv_proj": "mul mul",
        "model.layers.*.self_attn.o_proj": "add",
        "model.layers.*.mlp.gate_up_proj": "mul mul",
        "model.layers.*.mlp.down_proj": "add",
    },
    "bert": {
        "encoder.layer.*.attention.output.dense": "add",
        "encoder.layer.*.intermediate.dense": "gelu",
        "encoder.layer.*.output.dense": "add",
        "pooler.dense": "tanh",
    },
    "vit": {
        "layers.*.attention.o_proj": "add",
        "layers.*.mlp.fc1": "gelu",
        "layers.*.mlp.fc2": "add",
        "pooler.dense": "tanh",
    },
}


@dataclass(frozen=True)
class Emitted:
    """A model's rewritten program and what was emitted for it."""

    program: Program
    emission: Emission
    folder: Path

    def inputs(self, batch: int, length: int) -> list[Tensor]:
        """Of other sizes than the captured ones."""
        example = self.program.example
        if example[0].dim() == 4:
            return [torch.randn(batch, *example[0].shape[1:], generator=torch.Generator().manual_seed(0))]
        return [tokens(batch, length), *(torch.ones(batch, length, dtype=t.dtype) for t in example[1:])]


@pytest.fixture(scope="module")
def emitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emitted]:
    torch.manual_seed(0)
    model = globals()[request.param]().eval()
    example = torch.randn(2, 3, 16, 16) if request.param == "vit" else tokens(2, 8)
    program = rewriter.optimize(model, ["fuse", "shift_add"], (example,)).program
    folder = tmp_path_factory.mktemp(request.param)
    yield Emitted(program, emit(program, folder=folder), folder)


every_model = pytest.mark.parametrize("emitted", SITES, indirect=True, scope="module")


def starred(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


@every_model
def test_sites(emitted: Emitted, request: pytest.FixtureRequest) -> None:
    found = {starred(site.path): " ".join(n.partition(".")[0] for n in site.fused) for site in emitted.emission.sites}
    assert found == SITES[request.node.callspec.params["emitted"]]
    per_layer = sum("*" in path for path in found)
    assert len(emitted.emission.sites) == len(found) + per_layer  # two layers
    assert len(list(emitted.folder.iterdir())) == len(found)  # which share their files
    assert all(miss.reason and miss.site for miss in emitted.emission.misses)


@every_model
def test_same_results_where_no_kernel_runs(emitted: Emitted) -> None:
    inputs = emitted.inputs(3, 5)
    with torch.no_grad():
        before, after = emitted.program.run(*inputs), emitted.emission.program.run(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_model
def test_kernels_on_what_the_model_computes(emitted: Emitted, request: pytest.FixtureRequest) -> None:
    """Of several rows, or of one, which other kernels do; `test_lowering` has whole models."""
    one = request.node.callspec.params["emitted"] in ("gpt2", "llama")
    inputs = emitted.inputs(1, 1) if one else emitted.inputs(3, 7)
    for site in {site.emitted.path: site for site in emitted.emission.sites}.values():
        args = arguments_of(emitted.emission.program, site.emitted, *inputs)[0]
        assert (reason := complaint(site.emitted, args)) is None, reason


@every_model
def test_files_can_be_read(emitted: Emitted) -> None:
    for path in emitted.folder.iterdir():
        lines = path.read_text().splitlines()
        head = [line for line in lines if line.startswith("#")]
        assert all(
            any(word in line for line in head) for word in ("site ", "operator ", "rule ", "formula ", "content: ")
        )
        assert "shift_add" in next(line for line in head if "rule " in line)
        assert "hook:" not in path.read_text()
        assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("emitted", ["llama"], indirect=True, scope="module")
@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_compiled_ahead_of_time(emitted: Emitted, target: str) -> None:
    """A prologue with rows and columns, and an epilogue with a tile: as one row and as many."""
    sites = {starred(site.path).rpartition(".")[2]: site for site in emitted.emission.sites}
    for site in (sites["gate_up_proj"], sites["down_proj"]):
        for batch in (1, 64):
            for request in site.requests(batch):
                compiled = ahead_of_time.compile(request.start(request.configs[0]), target)
                assert not compiled.faults(), f"{site.path}: {compiled}"


@pytest.mark.parametrize("emitted", ["bert"], indirect=True, scope="module")
def test_what_a_kernel_was_not_made_for_runs_the_reference(emitted: Emitted, caplog: pytest.LogCaptureFixture) -> None:
    site = next(site for site in emitted.emission.sites if site.path.endswith("intermediate.dense"))
    args = list(arguments_of(emitted.emission.program, site.emitted, *emitted.inputs(2, 3))[0])
    wide = [a.double() if a.is_floating_point() else a for a in args]
    with interpreting(), pytest.raises(Unsupported, match="float64"):
        site.emitted.module.run(*wide)
    other = [args[0], *(torch.cat([a, a]) for a in args[1:])]  # twice the columns
    with interpreting(), pytest.raises(Unsupported, match="out_features=48, called with 96"):
        site.emitted.module.run(*other)
    with caplog.at_level(logging.DEBUG, "rewriter"):
        result = site.emitted.on_device(*other)
    assert torch.equal(result, site.emitted.module.reference(*other))
    assert "runs its reference: " in caplog.text


@pytest.mark.parametrize("emitted", ["vit"], indirect=True, scope="module")
def test_a_changed_file_is_refused(emitted: Emitted, tmp_path: Path) -> None:
    path = next(iter(sorted(emitted.folder.iterdir())))
    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace("acc = ", "acc = 2.0 * ", 1))
    with pytest.raises(ValueError, match="was changed after it was emitted"):
        load(changed)


_SCRIPT = """
import sys
import torch
from pathlib import Path
folder, where = Path(sys.argv[1]), sys.argv[2]
if where == "emit":
    import rewriter
    from rewriter.codegen.emitting import emit
    from test_emitting_models import small
    emit(small(), folder=folder)
else:
    sys.modules["rewriter.codegen"] = None
    from rewriter.kernels.emitted.loading import load
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            emitted = load(path)
            shapes = [torch.randn(3, 32), *torch.load(folder / "weights.pt")]
            print(path.name, emitted.operator(*shapes).shape)
"""


def small() -> Program:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Tanh()).eval()
    return rewriter.optimize(model, ["shift_add"], (torch.randn(2, 32),)).program


def run(folder: Path, where: str) -> str:
    """In a process of its own, where strings have other hashes."""
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]
    paths = f"import sys; sys.path[:0] = {here!r}\n"
    command = [sys.executable, "-W", "ignore", "-c", paths + _SCRIPT, str(folder), where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_files_in_every_process(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    emit(small(), folder=here)
    run(there, "emit")
    files = {path.name: path.read_bytes() for path in here.iterdir()}
    assert len(files) == 2
    assert files == {path.name: path.read_bytes() for path in there.iterdir()}


def test_files_load_without_the_generator(tmp_path: Path) -> None:
    program = small()
    (first, _) = emit(program, folder=tmp_path).sites
    args = arguments_of(emit(program, folder=tmp_path).program, first.emitted, torch.randn(3, 32))[0]
    torch.save([a.detach() for a in args[1:]], tmp_path / "weights.pt")
    for path in tmp_path.glob("*.py"):
        if path != first.emitted.path:
            path.unlink()
    assert run(tmp_path, "load") == f"{first.emitted.path.name} torch.Size([3, 48])\n"


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    """docs/codegen.md ends with what this emits."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.down = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, h: Tensor) -> Tensor:
            return h + 0.5 * nn.functional.gelu(self.down(self.norm(h)))

    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())}).eval().bfloat16()
    model.forward = model["blocks"].forward  # type: ignore[method-assign]
    program = rewriter.capture(model, (torch.randn(2, 8, 64, dtype=torch.bfloat16),))
    sites = emit(program, folder=tmp_path, dense=True).sites
    (path,) = {site.emitted.path for site in sites}
    page = (Path(__file__).parents[2] / "docs" / "codegen.md").read_text()
    assert path.read_text().rstrip() in page
