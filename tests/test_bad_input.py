# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an error that names what was refused and what to do next, and changes nothing.

The command line's side of it is in ``tests/cli``; attacks on single files of a saved model are in
``tests/engine/test_storage.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from unchanged import X, language_model, mlp, unchanged

import rewriter
from rewriter.errors import CaptureError, LegalityError, PlanError, RewriterError
from rewriter.passes import ShiftAdd, VQLogits


def refusal(error: type[RewriterError], model: nn.Module, passes: Any, *arguments: Any, **options: Any) -> str:
    """The message ``optimize`` refuses with, after which the model is as it was."""
    with unchanged(model), pytest.raises(error) as caught:
        rewriter.optimize(model, passes, *arguments, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- passes and options


def test_an_unknown_pass_names_the_nearest() -> None:
    message = refusal(PlanError, mlp(), ["shift_ad"], X)
    assert "unknown pass 'shift_ad'" in message
    assert "nearest: shift_add" in message
    listed = message.partition("known: ")[2].rstrip(".").split(", ")  # rules of other tests may be among them
    assert {"canonical", "fold", "fuse", "shift_add", "simplify", "vq_logits"} <= set(listed)
    assert listed == sorted(listed)


def test_an_unknown_option_names_the_nearest() -> None:
    from rewriter.cli.loading import parse_passes

    with pytest.raises(
        PlanError, match=r"pass shift_add has no option 'bit' \(nearest: bits.*it has: bits, group, mode"
    ):
        parse_passes("shift_add:bit=4")
    with pytest.raises(PlanError, match=r"shift_add:bits takes int, not 'four'"):
        parse_passes("shift_add:bits=four")
    with pytest.raises(PlanError, match="must be written option=value"):
        parse_passes("shift_add:bits")


def test_an_unknown_option_of_a_stored_plan_is_refused() -> None:
    plan = rewriter.plan(rewriter.capture(mlp(), X), ["shift_add"]).to_json()
    plan["sites"][0]["settings"]["bitz"] = 4
    with pytest.raises(PlanError, match=r"no option 'bitz' \(nearest: bits"):
        rewriter.Plan.from_json(plan)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("shift_add", r"passes must be a list.*write passes=\['shift_add'\]"),
        ([3], "passes must be names or Pass instances, not 3"),
        ([ShiftAdd], "passes must be names or Pass instances"),
    ],
)
def test_what_is_no_list_of_passes(passes: Any, message: str) -> None:
    import re

    assert re.search(message, refusal(PlanError, mlp(), passes, X))


@pytest.mark.parametrize("group", [0, -1])
def test_group_below_one(group: int) -> None:
    with pytest.raises(PlanError, match=rf"shift_add: group={group} must be at least 1"):
        ShiftAdd(group=group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "pot", "bits": 4, "terms": 3}, "bits=4 and terms=3 contradict each other: bits must be a multiple"),
        ({"mode": "pot", "bits": 4, "terms": 4}, "at least 2 bits"),
        ({"mode": "pot", "bits": 4, "terms": 0}, "terms=0 contradict"),
        ({"mode": "bcq", "terms": 2}, "terms=2 belongs to mode pot"),
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"mode": "bqc"}, r"unknown mode 'bqc' \(nearest: bcq\)"),
    ],
)
def test_bits_and_terms_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShiftAdd(**options)


@pytest.mark.parametrize("structure", ["tiers", "product"])
def test_more_codes_than_tokens(structure: str) -> None:
    message = refusal(PlanError, language_model(), [VQLogits(structure=structure, codes=513)])
    assert "codes=513 is more than the 512 tokens of the head" in message
    assert "ask for fewer" in message


@pytest.mark.parametrize("option", ["budget", "recover"])
def test_what_is_not_in_this_version_is_refused_not_ignored(option: str) -> None:
    message = refusal(PlanError, mlp(), ["shift_add"], X, **{option: object()})
    assert f"{option}= is not in this version and needs data" in message


def test_an_unknown_target_is_refused() -> None:
    assert "target must be one of" in refusal(PlanError, mlp(), ["shift_add"], X, target="tpu")
    assert "leave strict at False" in refusal(PlanError, mlp().double(), ["shift_add"], X.double(), strict=True)


# -------------------------------------------------------------------------------------------------------------- inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(6, 4)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.left(image) + self.right(text)


def test_inputs_that_cannot_be_inferred_print_the_call_to_write() -> None:
    message = refusal(CaptureError, TwoInputs(), ["shift_add"])
    assert "TwoInputs does not say what inputs it takes" in message
    assert "rewriter.optimize(model, example_inputs=(image, text,), …)" in message


def test_the_printed_call_works() -> None:
    opt = rewriter.optimize(TwoInputs(), ["shift_add"], example_inputs=(torch.randn(2, 4), torch.randn(2, 6)))
    assert len(opt.plan.sites) == 2


def test_calibration_inputs_that_do_not_fit() -> None:
    assert "calibration data is empty" in refusal(PlanError, mlp(), ["shift_add"], X, calibration=[])
    assert "a calibration input lacks" in refusal(PlanError, mlp(), ["shift_add"], X, calibration=[{"y": X}])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if float(y.sum()) > 0:  # the line that export refuses
            y = y + 1
        return y


def test_a_model_that_export_refuses_shows_the_users_line() -> None:
    message = refusal(CaptureError, Branching(), ["shift_add"], X)
    assert "torch.export refuses Branching" in message
    assert f"{Path(__file__).name}:" in message
    assert "if float(y.sum()) > 0:  # the line that export refuses" in message
    assert "make that line traceable" in message
    assert "site-packages/torch" not in message, "no trace of torch's internals"


# ------------------------------------------------------------------------------------------- sites that were asked for


def test_expect_that_is_not_met_lists_the_nearest_misses() -> None:
    message = refusal(PlanError, language_model(), ["fuse", "vq_logits"], expect={"vq_logits": 2})
    assert "expected 2 sites of vq_logits, found 1" in message
    message = refusal(PlanError, mlp(), ["vq_logits"], X, expect={"vq_logits": 1})
    assert "expected 1 sites of vq_logits, found 0" in message
    assert "too few for a vocabulary" in message


def test_expect_of_an_unknown_pass_names_the_nearest() -> None:
    assert "nearest: shift_add" in refusal(PlanError, mlp(), ["shift_add"], X, expect={"shift_ad": 2})


def test_select_of_a_place_where_nothing_matches() -> None:
    message = refusal(PlanError, mlp(), ["shift_add"], X, select={"1": "shift_add"})
    assert "select asks for shift_add at '1', but nothing there matches" in message
    message = refusal(PlanError, language_model(), ["shift_add"], select={"lm_haed": "shift_add"})
    assert "nearest: lm_head" in message


def test_select_of_a_place_that_is_refused_says_why() -> None:
    message = refusal(LegalityError, mlp(), ["vq_logits"], X, select={"2": "vq_logits"})
    assert "select asks for vq_logits at '2', which is refused" in message
    assert "too few for a vocabulary" in message


def test_select_of_a_pass_that_is_not_there_and_of_no_expression() -> None:
    message = refusal(PlanError, mlp(), ["shift_add"], X, select={"2": "shift_addd"})
    assert "names pass 'shift_addd', which is not among passes=['shift_add'] (nearest: shift_add)" in message
    assert "is not a regular expression" in refusal(PlanError, mlp(), ["shift_add"], X, select={"re:(": None})


# ------------------------------------------------------------------------------------------------------------- weights


class IntegerWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(64 * 64).reshape(64, 64) % 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.long(), self.weight).float()


def _with_value(value: float) -> nn.Module:
    model = mlp()
    model[2].weight.data[3, 5] = value
    return model


UNFIT: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "integer": (
        lambda: nn.Sequential(mlp(), IntegerWeight()),
        X,
        "1",
        "weight '1.weight' is an integer tensor (torch.int64)",
    ),
    "complex": (
        lambda: nn.Sequential(nn.Linear(64, 64, dtype=torch.complex64)),
        X.to(torch.complex64),
        "0",
        "weight '0.weight' is complex (torch.complex64)",
    ),
    "NaN": (lambda: _with_value(float("nan")), X, "2", "weight '2.weight' has NaN or infinite values"),
    "infinite": (lambda: _with_value(float("inf")), X, "2", "weight '2.weight' has NaN or infinite values"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_cannot_be_rewritten_are_a_miss_with_a_reason(kind: str) -> None:
    build, x, site, reason = UNFIT[kind]
    model = build()
    with unchanged(model):
        opt = rewriter.optimize(model, ["shift_add"], x)
    assert [reason in m.reason for m in opt.report.misses if m.site == site] == [True]
    assert site not in {path for s in opt.plan.sites for path in s.paths}
    with torch.no_grad():
        assert opt(x).shape == model(x).shape, "the rest of the model is still there"


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_cannot_be_rewritten_are_an_error_where_asked_for(kind: str) -> None:
    build, x, site, reason = UNFIT[kind]
    message = refusal(LegalityError, build(), ["shift_add"], x, select={site: "shift_add"})
    assert f"select asks for shift_add at {site!r}" in message
    assert reason in message
    message = refusal(LegalityError, build(), ["shift_add"], x, expect={"shift_add": 3})
    assert "expected 3 sites of shift_add" in message
    assert reason in message


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    message = refusal(CaptureError, model, ["shift_add"], X)
    assert "'0.weight' is on the meta device and has no values; load the checkpoint first" in message


class Tagged(Tensor):
    """A tensor subclass as quantisation libraries make them."""


def test_tensor_subclass_weights() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Tagged))
    message = refusal(CaptureError, model, ["shift_add"], X)
    assert "'0.weight' is a Tagged (sharded, quantised or another tensor subclass)" in message
    assert "plain tensor first" in message


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed to itself")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = mlp()
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.data, mesh, [Shard(0)]))
    with pytest.raises(CaptureError, match=r"'2.weight' is a DTensor \(sharded.*gather or dequantise it"):
        rewriter.optimize(model, ["shift_add"], X)
    assert type(model[2].weight.data).__name__ == "DTensor"
