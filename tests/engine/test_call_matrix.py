# SPDX-License-Identifier: Apache-2.0
"""`Optimized` in place of the model: every way to call it, with no rewrite at all and with all three passes.

What it is compared with: :func:`kinds.reference`, the model's own code called the same way.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rewriter.errors import CaptureError

from . import kinds
from .kinds import CAUSAL, KINDS, LANGUAGE, PLANS, Call, padded, tokens

both_plans = pytest.mark.parametrize("plan", PLANS)
all_kinds = pytest.mark.parametrize("kind", KINDS)
with_module = pytest.mark.parametrize("kind", [k for k in KINDS if k != "exported"])

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
# Of an output's largest magnitude: the order of summation differs between spellings, nothing else does.
ROUNDING = {torch.float32: 4e-6, torch.float64: 1e-14, torch.float16: 5e-3, torch.bfloat16: 4e-2}
ACCURACY = {torch.float64: 4e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of a dtype, against float32


def near(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Same types, names, shapes and dtypes, and values within ``tolerance`` of each output's largest magnitude."""
    assert type(actual) is type(expected)
    a, e = kinds.tensors(actual), kinds.tensors(expected)
    assert list(a) == list(e)
    for name, value in e.items():
        allowed = (ROUNDING[value.dtype] if tolerance is None else tolerance) * float(value.abs().max().double())
        torch.testing.assert_close(a[name], value, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


def first(output: Any) -> Tensor:
    return next(iter(kinds.tensors(output).values()))


def moved(kind: str, plan: str, change: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module]:
    """Copies of the optimised model and its reference, both changed."""
    pair = copy.deepcopy(kinds.optimized(kind, plan)), copy.deepcopy(kinds.reference(kind, plan))
    for module in pair:
        change(module)
    return pair


@contextmanager
def seeded(seed: int = 1) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


CALLS = [(kind, name) for kind in KINDS for name in kinds.calls(kind)]


@both_plans
@pytest.mark.parametrize(("kind", "name"), CALLS, ids=[f"{k}-{n.replace(' ', '_')}" for k, n in CALLS])
def test_calls(kind: str, name: str, plan: str) -> None:
    call = kinds.calls(kind)[name]
    near(call(kinds.optimized(kind, plan)), call(kinds.reference(kind, plan)))


@pytest.mark.parametrize("kind", KINDS)
def test_all_passes_found_something_to_do(kind: str) -> None:
    """Otherwise "all passes" would be the identity plan once more."""
    rules = {site.rule for site in kinds.optimized(kind, "all").plan.sites}
    wanted = {"shift_add.linear"}
    wanted |= {"fuse.attention"} if kind != "sequential" else set()
    wanted |= {"fuse.qkv"} if kind not in ("sequential", "gpt2") else set()  # GPT-2 has them in one already
    wanted |= {"fuse.gate_up"} if kind == "llama" else set()  # the others have no gated linear units
    wanted |= {"vq_logits.head"} if kind not in ("bert", "vit") else set()  # no vocabulary
    wanted |= {"shift_add.embedding"} if kind in (*LANGUAGE, "exported") else set()
    assert rules == wanted


def test_an_exported_program_is_called_as_its_own_module_is() -> None:
    exported = kinds.build_input("exported")
    opt = kinds.optimized("exported", "identity")
    for call in kinds.calls("exported").values():
        near(call(opt), call(exported.module()))
    with pytest.raises(CaptureError, match=r"\(tensor, mask=tensor\).*this one knows: \(tensor, tensor\)"):
        opt(tokens(2, 5), mask=torch.zeros(2, 5))


# --------------------------------------------------------------------------------- one call, many spellings


@both_plans
@with_module
def test_positional_keyword_and_explicit_none_are_one_program(kind: str, plan: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, plan))
    plain = kinds.plain(kind)
    name = next(iter(kinds.calls(kind)["keyword"].kwargs))
    expected = plain(opt)
    before = len(opt._programs)
    spellings = [Call((), {name: plain.args[0]})]
    spellings += [Call(plain.args, {"labels": None})] if kind in (*CAUSAL, "vit") else []
    for call in spellings:
        kinds.assert_same(call(opt), expected)
    assert len(opt._programs) == before


@pytest.mark.parametrize("kind", LANGUAGE)
def test_the_order_of_keywords_does_not_matter(kind: str) -> None:
    opt = kinds.optimized(kind, "identity")
    ids, mask = tokens(3, 9), padded(3, 9, "right")
    expected = opt(input_ids=ids, attention_mask=mask)
    before = len(opt._programs)
    kinds.assert_same(opt(attention_mask=mask, input_ids=ids), expected)
    assert len(opt._programs) == before


def test_an_argument_given_twice_is_a_type_error_as_in_python() -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        kinds.optimized("gpt2", "identity")(tokens(1, 4), input_ids=tokens(1, 4))


# ------------------------------------------------------------------------------------ laws of the rewritten


@pytest.mark.parametrize(
    ("kind", "side"), [*((k, "right") for k in LANGUAGE), ("llama", "left"), ("exported", "left")]
)
def test_padding_does_not_change_the_tokens_that_are_seen(kind: str, side: str) -> None:
    """Left padding moves absolute positions (GPT-2, BERT), so there it is another sentence."""
    opt = kinds.optimized(kind, "all")
    ids, mask = tokens(2, 9), padded(2, 9, side, count=4)
    seen = slice(4, None) if side == "left" else slice(0, 5)
    if kind == "exported":
        whole, alone = opt(ids, (mask - 1.0) * 1e9), opt(ids[:1, seen], torch.zeros(1, 5))
    else:
        whole, alone = first(opt(ids, attention_mask=mask)), first(opt(ids[:1, seen]))
    near(whole[:1, seen], alone, 1e-5)
    assert (
        whole[0] - first(opt(ids, torch.zeros(2, 9)) if kind == "exported" else opt(ids))[0]
    ).abs().max() > 1e-3 or kind in CAUSAL


@both_plans
@all_kinds
def test_rows_of_a_batch_are_independent(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    args = kinds.plain(kind).args
    whole = first(opt(*args))
    for i in range(len(whole)):
        near(first(opt(*(a[i : i + 1] for a in args))), whole[i : i + 1], 1e-5)


# ----------------------------------------------------------------------------------------- dtypes and modes


@pytest.mark.parametrize("method", DTYPES)
@both_plans
@all_kinds
def test_dtypes(kind: str, plan: str, method: str) -> None:
    dtype = DTYPES[method]
    opt, reference = moved(kind, plan, lambda m: getattr(m, method)())
    assert {p.dtype for p in opt.parameters() if p.is_floating_point()} == {dtype}
    call = kinds.plain(kind).to(dtype)
    actual = call(opt)
    near(actual, call(reference))
    wide = first(kinds.plain(kind)(kinds.optimized(kind, plan)))
    assert first(actual).dtype == dtype
    near(first(actual).to(wide.dtype), wide, ACCURACY[dtype])


@both_plans
@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_there_and_back_through_double_is_nothing(kind: str, plan: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, plan))
    opt.double()
    kinds.plain(kind).to(torch.float64)(opt)
    opt.float()
    kinds.assert_same(kinds.plain(kind)(opt), kinds.plain(kind)(kinds.optimized(kind, plan)))


@both_plans
@with_module
def test_training_drops_out_as_the_model_does(kind: str, plan: str) -> None:
    opt, reference = moved(kind, plan, lambda m: m.train())
    assert opt.training
    call = kinds.plain(kind)
    with seeded():
        one, two = call(opt), call(opt)
    assert not torch.equal(first(one), first(two))
    with seeded():
        near(one, call(reference))
    if kind == "sequential":
        call(reference)  # as often as the copy
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(opt.get_buffer(f"1.{name}"), reference.get_buffer(f"1.{name}"))


@both_plans
@with_module
def test_evaluation_after_training_is_evaluation_again(kind: str, plan: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, plan))
    call = kinds.plain(kind)
    opt.train()
    opt.eval()
    kinds.assert_same(call(opt), call(kinds.optimized(kind, plan)))
    kinds.assert_same(call(opt), call(opt))


def test_an_exported_program_has_no_other_mode() -> None:
    opt = copy.deepcopy(kinds.optimized("exported", "identity"))
    with pytest.raises(CaptureError, match=r"ExportedProgram.*no other mode.*nn\.Module"):
        opt.train()
    assert not opt.training


@both_plans
@all_kinds
def test_gradients(kind: str, plan: str) -> None:
    """Of a scalar of the output, with respect to every parameter both have under one name."""
    opt, reference = moved(kind, plan, lambda m: m.requires_grad_(True))
    for module in (opt, reference):
        first(kinds.plain(kind)(module)).square().mean().backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in opt.named_parameters() if p.grad is not None}
    shared = [n for n in expected if n in found and found[n].shape == expected[n].shape]
    assert len(shared) >= (len(expected) if plan == "identity" else 3)
    largest = max(float(expected[n].abs().max()) for n in shared)
    for name in shared:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@both_plans
@all_kinds
def test_autocast(kind: str, plan: str) -> None:
    call = kinds.plain(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = call(kinds.optimized(kind, plan)), call(kinds.reference(kind, plan))
    near(actual, expected, ROUNDING[torch.bfloat16])


@both_plans
@all_kinds
def test_modes_of_the_caller_do_not_stick_to_a_program(kind: str, plan: str) -> None:
    """A program captured under no_grad and autocast is the one used with gradients and without autocast."""
    fresh = copy.deepcopy(kinds.optimized(kind, plan))
    call = list(kinds.calls(kind).values())[-1]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        call(fresh)
    result = call(fresh)
    near(result, call(kinds.reference(kind, plan)))
    assert any(t.requires_grad for t in kinds.tensors(result).values())


# -------------------------------------------------------------------------------------------- torch.compile


WARM_UP = ((2, 7), (3, 9))
SHAPES = ((4, 11), (2, 5), (6, 13), (3, 8), (5, 12))


def of_shape(kind: str, batch: int, length: int) -> Call:
    if kind in LANGUAGE:
        return (
            Call((tokens(batch, length), torch.ones(batch, length, dtype=torch.long)))
            if kind != "gpt2"
            else Call(
                (),
                {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)},
            )
        )
    if kind == "exported":
        return Call((tokens(batch, length), torch.zeros(batch, length)))
    plain = kinds.plain(kind).args[0]
    return Call((torch.cat([plain, plain])[:batch],))


@both_plans
@all_kinds
def test_inside_torch_compile_there_is_no_break_and_no_recompilation(kind: str, plan: str) -> None:
    torch._dynamo.reset()
    opt = copy.deepcopy(kinds.optimized(kind, plan))
    counter = CompileCounterWithBackend("aot_eager" if plan == "all" else "eager")
    compiled = torch.compile(opt, backend=counter, fullgraph=True)
    with torch.no_grad():
        of_shape(kind, 2, 7)(opt)  # the program is captured outside
        for shape in WARM_UP:
            of_shape(kind, *shape)(compiled)
        warm = counter.frame_count
        for shape in SHAPES:
            call = of_shape(kind, *shape)
            near(call(compiled), call(opt), 1e-5)
    assert counter.frame_count == warm <= len(WARM_UP)


def test_a_first_call_inside_torch_compile_captures_and_is_right() -> None:
    torch._dynamo.reset()
    opt = copy.deepcopy(kinds.optimized("llama", "identity"))
    compiled = torch.compile(opt, backend="eager")
    call = kinds.calls("llama")["labels"]
    with torch.no_grad():
        near(call(compiled), call(kinds.reference("llama", "identity")))


# --------------------------------------------------------------------------------------- copies and threads


@both_plans
@all_kinds
def test_deepcopy_is_equal_and_apart(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    call = kinds.plain(kind)
    expected = call(opt)
    copied = copy.deepcopy(opt)
    kinds.assert_same(call(copied), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.equal(first(call(copied)), first(expected))
    kinds.assert_same(call(opt), expected)


@both_plans
@all_kinds
def test_pickle(kind: str, plan: str) -> None:
    opt = kinds.optimized(kind, plan)
    loaded = pickle.loads(pickle.dumps(opt))
    for name in list(kinds.calls(kind))[:5]:  # some known to the copy, some captured by it
        call = kinds.calls(kind)[name]
        kinds.assert_same(call(loaded), call(opt))
    assert loaded.plan == opt.plan
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in opt.named_parameters()
    }


@both_plans
@all_kinds
def test_eight_threads_call_at_once_also_for_the_first_time(kind: str, plan: str) -> None:
    opt = copy.deepcopy(kinds.optimized(kind, plan))
    call = kinds.calls(kind)["labels" if kind in (*CAUSAL, "vit") else "other sizes"]
    expected = call(kinds.optimized(kind, plan))
    start = threading.Barrier(8)
    results: list[Any] = [None] * 8

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            results[i] = [call(opt) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert found is not None, "a thread failed"
        for one in found:
            near(one, expected)
