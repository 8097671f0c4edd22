# SPDX-License-Identifier: Apache-2.0
"""The Tversky projection as a module: in place of an `nn.Linear`, trainable, saved under its roles' names."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from rewriter.kernels.tversky import reference
from rewriter.kernels.tversky.op import tversky


@dataclass(frozen=True)
class Similarity:
    """What is summed and how: the options of the operator, explained in `rewriter.kernels.tversky.reference`.

    Attributes:
        intersection: ``"product"``, ``"min"``, ``"max"``, ``"mean"``, ``"gmean"`` or ``"softmin"``.
        convention: ``"paper"`` (per feature) or ``"code"`` (of the sums, as in the authors' program).
        difference: ``"ignorematch"`` or ``"subtractmatch"``.
        form: ``"contrast"`` or ``"ratio"``.
        mirrored: the bank is [Ω; −Ω], of which Ω is stored.
        projected: prototypes are stored by their scores on Ω, ``[P, K]``, instead of as ``[P, d]``.
    """

    intersection: str = "product"
    convention: str = "paper"
    difference: str = "ignorematch"
    form: str = "contrast"
    mirrored: bool = False
    projected: bool = False

    def __post_init__(self) -> None:
        reference.check_names(self.intersection, self.convention, self.difference, self.form)


class TverskyProjection(nn.Module):
    """Similarities ``[..., P]`` of inputs ``[..., d]`` to P prototypes, on K features.

    Args:
        features: Ω ``[K, d]``.
        prototypes: Π ``[P, d]``, or ``[P, K]`` where ``similarity.projected``.
        theta, alpha, beta: coefficients, ``[]`` or ``[P]``; None leaves the term out (θ: is 1).
        negative: coefficient ``[]`` of the similarity to −Π, which is subtracted; None computes none.
        bias: ``[P]`` or None.
        similarity: what is computed of them.

    A `nn.Parameter` is shared, any other tensor becomes one; ``negative`` is a buffer, for recipes to set.

    Raises:
        ValueError: tensors that do not fit together.
    """

    features: nn.Parameter
    prototypes: nn.Parameter
    theta: nn.Parameter | None
    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    bias: nn.Parameter | None
    negative: Tensor | None

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        theta: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
        negative: Tensor | None = None,
        bias: Tensor | None = None,
        similarity: Similarity | None = None,
    ) -> None:
        super().__init__()
        self.similarity = similarity or Similarity()
        probe = features.new_empty((0, features.shape[-1]))
        reference.check(
            probe, features, prototypes, theta, alpha, beta, negative, bias, projected=self.similarity.projected
        )
        for role, tensor in (
            ("features", features), ("prototypes", prototypes), ("theta", theta), ("alpha", alpha), ("beta", beta),
            ("bias", bias),
        ):  # fmt: skip
            self.register_parameter(role, None if tensor is None else _as_parameter(tensor))
        self.register_buffer("negative", negative)
        self.in_features, self.out_features = features.shape[1], prototypes.shape[0]

    @classmethod
    def fresh(
        cls,
        in_features: int,
        out_features: int,
        features: int,
        *,
        similarity: Similarity | None = None,
        prototypes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TverskyProjection:
        """To be trained from scratch, as the authors start: Ω and Π uniform in [0, 1), θ = 1, α = β = 1/2.

        Args:
            in_features, out_features, features: d, P and K.
            similarity: what is computed.
            prototypes: shared ones (token embeddings, say) instead of random ones.
            generator: of the random numbers.
        """
        similarity = similarity or Similarity()
        bank = torch.rand(features, in_features, generator=generator)
        if prototypes is None:
            width = features if similarity.projected else in_features
            prototypes = torch.rand(out_features, width, generator=generator)
        one, half = torch.tensor(1.0), torch.tensor(0.5)
        return cls(bank, prototypes, one, half, half.clone(), similarity=similarity)

    def forward(self, x: Tensor) -> Tensor:
        """Similarities ``[..., P]`` in the dtype of x ``[..., d]``."""
        s = self.similarity
        return tversky(
            x, self.features, self.prototypes, self.theta, self.alpha, self.beta, self.negative, self.bias,
            s.intersection, s.convention, s.difference, s.form, s.mirrored, s.projected,
        )  # fmt: skip

    def memberships(self, x: Tensor) -> Tensor:
        """How much of each feature inputs have: relu(x Ωᵀ) ``[..., K]``, 2K wide for a mirrored bank."""
        scores = nn.functional.linear(x, self.features.to(x.dtype))
        return (reference.mirror(scores) if self.similarity.mirrored else scores).relu()

    def prototype_memberships(self) -> Tensor:
        """How much of each feature prototypes have, ``[P, K]``; 2K wide for a mirrored bank."""
        if not self.similarity.projected:
            return self.memberships(self.prototypes)
        scores: Tensor = self.prototypes
        return (reference.mirror(scores) if self.similarity.mirrored else scores).relu()

    def rows(self, start: int, end: int) -> TverskyProjection:
        """The projection onto prototypes ``start`` to ``end - 1`` alone, with tensors of its own."""

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else own(tensor if tensor.dim() == 0 else tensor[start:end])

        return TverskyProjection(
            own(self.features), own(self.prototypes[start:end]), part(self.theta), part(self.alpha), part(self.beta),
            part(self.negative), part(self.bias), similarity=self.similarity,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in asdict(self.similarity).items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, features={self.features.shape[0]}, "
            f"bias={self.bias is not None}, pair={self.negative is not None}, {options}"
        )


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
