# SPDX-License-Identifier: Apache-2.0
"""From the exact pair to a single pass: the negative branch fades while a teacher is imitated.

    y(t) = S(x, Π) − c(t) S(x, −Π),    c(0) = 1  (the linear layer, exactly)  →  c(T) = 0  (one pass, half the work)

Started as a single pass, a Tversky layer is 43 % off its linear layer. The pair is not off at all, and each step takes
only as much away as training can follow. α and β start at 0 and are free from the first step.

    pair = exact_pair(linear)
    Annealing(steps=1000).run(model, teacher, batches, optimizer)    # model holds the pair, teacher the linear layer
    single_pass(model)                                               # drops the branch, whose coefficient is 0

`init="signed_pair"` makes the same pair of every site of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.passes.tversky import exact
from rewriter.passes.tversky.modules import TverskyProjection

Loss = Callable[[Any, Any], Tensor]
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "linear": lambda part: 1 - part,
}
_ROLE = "negative"


@dataclass(frozen=True)
class Annealing:
    """A schedule for the coefficient of the negative branch, and the training that follows it.

    Attributes:
        steps: optimiser steps in all.
        schedule: ``"cosine"`` or ``"linear"``, from 1 to 0.
        settle: share of the steps, at the end, that train the single pass (c = 0).
    """

    steps: int
    schedule: str = "cosine"
    settle: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.schedule not in _SHAPES:
            raise ValueError(f"unknown schedule {self.schedule!r}; one of {', '.join(_SHAPES)}")
        if not 0 <= self.settle < 1:
            raise ValueError(f"settle={self.settle} is a share of the steps, at least 0 and below 1")

    def coefficient(self, step: int) -> float:
        """c at a step: 1 at 0, 0 from the share `settle` before the end on."""
        if step < 0:
            raise ValueError(f"step={step} is negative")
        falling = self.steps * (1 - self.settle)
        return _SHAPES[self.schedule](step / falling) if step < falling else 0.0

    def set(self, model: nn.Module, step: int) -> None:
        """Set c for a step in every exact pair of a model."""
        for coefficient in negatives(model):
            coefficient.fill_(self.coefficient(step))

    def run(
        self,
        model: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
    ) -> list[float]:
        """Train ``model`` to follow ``teacher`` while its pairs become single passes.

        Args:
            model: holds exact pairs, and is trained; it ends with c = 0 everywhere.
            teacher: the original; it is not changed, and gets no gradients.
            batches: inputs, one per step; a tuple is passed as several arguments, a mapping by name.
            optimizer: over the parameters to train.
            loss: of the outputs of model and teacher; None is the mean squared error of tensors, relative to the
                teacher's mean square. :func:`distillation` is the one for logits.

        Returns:
            The loss at each step, before its update.

        Raises:
            ValueError: the model holds no pair, or there are fewer batches than steps.
        """
        if not negatives(model):
            raise ValueError('the model holds no negative branch: make pairs first (exact_pair, or init="signed_pair")')
        measure = relative_error if loss is None else loss
        losses: list[float] = []
        for step, batch in zip(range(self.steps), batches, strict=False):
            self.set(model, step)
            with torch.no_grad():
                wanted = _called(teacher, batch)
            value = measure(_called(model, batch), wanted)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        if len(losses) < self.steps:
            raise ValueError(f"{self.steps} steps need as many batches, and there were {len(losses)}")
        self.set(model, self.steps)
        return losses


def exact_pair(linear: nn.Linear) -> TverskyProjection:
    """A linear layer as the pair S(x, Π) − S(x, −Π): the same function; Ω = [I; −I], Π = W, α = β = 0."""
    fit = exact.signed_pair(linear.weight)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return TverskyProjection(
        fit.features, fit.prototypes if fit.prototypes is not None else linear.weight.detach().clone(),
        fit.theta, fit.alpha, fit.beta, fit.negative, bias,
    )  # fmt: skip


def negatives(model: nn.Module) -> list[Tensor]:
    """The coefficients of all negative branches, ``[]`` each."""
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == _ROLE and buffer.dim() == 0]


def single_pass(model: nn.Module) -> None:
    """Drop the negative branches of a module, so that they cost nothing any more.

    Raises:
        ValueError: a coefficient is not 0: dropping it would change the function.
    """
    pairs = [(name, m) for name, m in model.named_modules() if isinstance(m, TverskyProjection)]
    for name, module in pairs:
        if module.negative is not None and float(module.negative) != 0.0:
            raise ValueError(
                f"{name or 'the projection'} still has c = {float(module.negative):g}; anneal it to 0 first"
            )
    for _, module in pairs:
        module.negative = None


def relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the mean square of what is wanted, in float32 at least; both ``[...]``."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    return (output.to(wide) - wanted.to(wide)).square().mean() / wanted.to(wide).square().mean()


def distillation(output: Any, wanted: Any) -> Tensor:
    """KL(teacher ‖ model) in nats per token, of logits ``[..., V]`` or outputs that have ``.logits``."""
    mine, its = (getattr(o, "logits", o).float().log_softmax(-1).flatten(0, -2) for o in (output, wanted))
    return nn.functional.kl_div(mine, its, reduction="batchmean", log_target=True)


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
