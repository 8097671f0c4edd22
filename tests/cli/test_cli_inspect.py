# SPDX-License-Identifier: Apache-2.0
"""`passes`, `inspect`, `plan` and `diff`: commands that only look."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import typer
from commands import ALL, Run, data, done, readable, refused

import rewriter
from rewriter.cli.app import app

ATTENTION = "model.layers.0.self_attn"


def test_passes_are_listed_with_contract_and_options(run: Run) -> None:
    found = {one["name"]: one for one in data(run("passes", "--json"))}
    assert set(found) == set(rewriter.passes.available())  # type: ignore[attr-defined]
    assert found["fuse"]["contract"] == "EXACT"
    bits = next(o for o in found["shift_add"]["options"] if o["name"] == "bits")
    assert bits["default"] == 4
    assert bits["type"] == "int"
    text = "\n".join(readable(done(run("passes"))))
    assert all(name in text for name in found)


@pytest.mark.parametrize(
    ("name", "contract", "summary"),
    [
        ("canonical", "EXACT", "Replace written-out norms, activations, softmaxes and losses by single operators."),
        ("fold", "EXACT", "Fold norms and linears into the linears next to them; new weights are computed in float64"),
        ("fuse", "EXACT", "Fuse written-out attention into one operator, and q, k, v or gate, up linears of one input"),
        ("shift_add", "CALIBRATED", "Store linear weights in a few bits, as sums of signed bases or powers of two"),
        ("simplify", "EXACT", "Remove what computes nothing new."),
        ("vq_logits", "CALIBRATED", "Replace the vocabulary head by a codebook: logits from sums of table look-ups"),
    ],
)
def test_passes_says_what_each_one_promises_and_does(run: Run, name: str, contract: str, summary: str) -> None:
    lines = [line.strip() for line in readable(done(run("passes")))]
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == [name, contract])
    first = lines[start].removeprefix(name).strip().removeprefix(contract)
    assert " ".join(f"{first} {' '.join(lines[start + 1 :])}".split()).startswith(summary)  # over one or two lines


@pytest.mark.parametrize("name", rewriter.passes.available())  # type: ignore[attr-defined]
def test_every_option_of_a_pass_is_explained(run: Run, name: str) -> None:
    options = data(run("passes", name, "--json"))["options"]
    assert options
    assert all(option["meaning"] for option in options)
    text = done(run("passes", name))
    readable(text)
    assert all(option["name"] in text for option in options)


def test_an_unknown_pass_is_refused_with_the_nearest(run: Run) -> None:
    assert "nearest: shift_add" in refused(run("passes", "shiftadd"))


def test_every_option_of_optimize_has_a_flag() -> None:
    """Those that are not in this version (budget, recover) and the progress callback have none."""
    command = typer.main.get_command(app).commands["optimize"]  # type: ignore[attr-defined]
    flags = {flag.removeprefix("--").replace("-", "_") for p in command.params for flag in p.opts}
    named = {"model": "model", "example_kwargs": "example_inputs", "dynamic_shapes": "static_shapes"}
    wanted = {named.get(name, name) for name in inspect.signature(rewriter.optimize).parameters} - {
        "budget",
        "recover",
        "progress",
    }
    assert wanted <= flags, wanted - flags


def test_help_shows_every_command_and_examples(run: Run) -> None:
    text = done(run("--help"))
    commands = "inspect explain plan apply optimize diff kernels verify passes export".split()
    assert all(f" {c} " in text for c in commands)
    for command in commands:
        help_text = done(run(command, "--help"))
        readable(help_text)
        assert f"rewriter {command} " in help_text.partition("Examples")[2], f"{command} has no example"


# -------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_tree_with_sizes_and_what_could_be_taken(run: Run, folder: Path) -> None:
    lines = readable(done(run("inspect", folder)))
    (layers,) = [line for line in lines if "0 … 1" in line]  # two layers that are alike are one row
    assert "2 × " in layers
    (q,) = [line for line in lines if "q_proj" in line]
    assert "4,096" in q
    assert "8.19 kB" in q  # 64 × 64 fp16, though computed in float32
    assert "fuse, shift_add" in q
    (gate,) = [line for line in lines if "gate_proj" in line]
    assert "fuse, shift_add" in gate
    (head,) = [line for line in lines if "lm_head" in line]
    assert "vq_logits" in head
    # q, k, v and gate, up in two layers; seven linears in each, the head and the embedding
    assert any("fuse: 4 sites" in line and "shift_add: 16 sites" in line for line in lines)
    assert not any("fuse.qkv" in line for line in lines), "what a rule takes is not what it left alone"


def test_inspect_as_json_lists_every_layer(run: Run, folder: Path) -> None:
    found = data(run("inspect", folder, "--json", "--passes", "shift_add"))
    modules = {m["path"]: m for m in found["modules"]}
    assert modules["model.layers.1.mlp.up_proj"] == {
        "path": "model.layers.1.mlp.up_proj",
        "parameters": 64 * 96,
        "bytes": 64 * 96 * 2,
        "passes": ["shift_add"],
    }
    assert found["sites"] == {"shift_add": 15}
    assert found["inputs"][0].startswith("input_ids i64[")


def test_inspect_site_shows_nodes_with_shapes_under_their_source_lines(run: Run, folder: Path) -> None:
    lines = readable(done(run("inspect", folder, "--site", ATTENTION)))
    source = next(i for i, line in enumerate(lines) if re.match(r"modeling_llama\.py:\d+  .*q_proj", line))
    assert re.match(r"  linear\w* = aten\.linear\(\w+, q_proj\.weight\) → f32\[s\d+, s\d+, 64\]", lines[source + 1])
    assert any(line.split()[:2] == [f"{ATTENTION}.q_proj.weight", "f32[64,"] for line in lines)


def test_inspect_site_as_json(run: Run, folder: Path) -> None:
    found = data(run("inspect", folder, "--site", ATTENTION, "--json"))
    linear = next(n for n in found["nodes"] if n["op"] == "aten.linear.default")
    assert linear["path"] == f"{ATTENTION}.q_proj"
    assert "modeling_llama.py:" in linear["source"]
    assert found["tensors"][f"{ATTENTION}.k_proj.weight"]["bytes"] == 32 * 64 * 2


def test_inspect_names_the_nearest_site(run: Run, folder: Path) -> None:
    assert ATTENTION in refused(run("inspect", folder, "--site", "model.layers.0.self_atn"))


# ----------------------------------------------------------------------------------------------------------------- plan


def test_plan_is_shown_by_rule_and_written_as_json(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    lines = readable(done(run("plan", folder, "-p", ALL, "--out", out)))
    assert any(line.startswith("shift_add.linear · ") for line in lines)
    for merged in ("self_attn.qkv_proj", "mlp.gate_up_proj"):  # made by fuse, and taken again by shift_add
        rows = [line for line in lines if f"model.layers.{{0…1}}.{merged}" in line]
        assert len(rows) == 2 and all(line.rstrip().endswith("×2") for line in rows), rows
    skipped = [line.split()[:2] for line in lines[lines.index("skipped") :] if line.startswith((" fuse", " shift_add"))]
    assert skipped == [["shift_add.linear", "lm_head"]]
    stored = json.loads(out.read_text())
    assert {site["rule"] for site in stored["sites"]} == {
        "fuse.qkv",
        "fuse.gate_up",
        "shift_add.linear",
        "shift_add.embedding",
        "vq_logits.head",
    }
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_plan_takes_select_and_expect(run: Run, folder: Path) -> None:
    chosen = ("--select", "re:.*mlp.*=shift_add", "--select", "re:.*=none")
    found = data(run("plan", folder, "-p", "shift_add", *chosen, "--expect", "shift_add=6", "--json"))
    assert len(found["sites"]) == 6
    assert all(".mlp." in site["address"]["path"] for site in found["sites"])
    message = refused(run("plan", folder, "-p", "shift_add", *chosen, "--expect", "shift_add=7"))
    assert "expected 7 sites of shift_add, found 6" in message
    assert "protected by select" in message


# ----------------------------------------------------------------------------------------------------------------- diff


def test_diff_shows_before_and_after_side_by_side(run: Run, folder: Path) -> None:
    lines = readable(done(run("diff", folder, "-p", "fuse", "--site", ATTENTION)))
    assert f"{ATTENTION}.qkv_proj" in "\n".join(lines)
    assert any(line.startswith("- q_proj.weight → f32[64, 64]") and "+ weight → f32[128, 64]" in line for line in lines)
    right = [line[50:].strip() for line in lines]
    assert any("aten.linear(" in line for line in right)
    assert any(line.startswith("fuse.qkv, from linear") for line in right), "each new node says its rule and origin"


def test_diff_as_json_keeps_every_node(run: Run, folder: Path) -> None:
    found = data(run("diff", folder, "-p", "fuse", "--json"))
    made = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    assert [site["path"] for site in found["sites"]] == [f"model.layers.{i}.{name}" for i in (0, 1) for name in made]
    first = found["sites"][0]
    assert [n["op"] for n in first["removed"]].count("aten.linear.default") == 3
    (linear,) = [n for n in first["added"] if n["op"] == "aten.linear.default"]
    assert linear["rule"] == "fuse.qkv"
    assert {n["name"] for n in first["removed"] if n["op"] == "aten.linear.default"} <= {
        o.partition(":")[0] for o in linear["origin"]
    }
    second = found["sites"][1]
    assert [n["op"] for n in second["removed"]].count("aten.linear.default") == 2
    assert [n["rule"] for n in second["added"] if n["op"] == "aten.linear.default"] == ["fuse.gate_up"]


def test_diff_of_a_place_that_did_not_change_is_refused(run: Run, folder: Path) -> None:
    assert "nothing changed at 'lm_head'" in refused(run("diff", folder, "-p", "fuse", "--site", "lm_head"))
