# SPDX-License-Identifier: Apache-2.0
"""What one call of the operator `tversky` is given, written once for its fake, its cost, its gradient and its kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from rewriter.kernels.tversky import reference

TENSORS = 8  # x to bias; the options follow


class Names(NamedTuple):
    """Which similarity it is."""

    intersection: str
    convention: str
    difference: str
    form: str


@dataclass(frozen=True)
class Arguments:
    """The arguments in the order of the schema, so that ``Arguments(*args)`` names them.

    What each is, and its shape, is said at `rewriter.kernels.tversky.reference.tversky`.
    """

    x: Tensor
    features: Tensor
    prototypes: Tensor
    theta: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    negative: Tensor | None
    bias: Tensor | None
    intersection: str
    convention: str
    difference: str
    form: str
    mirrored: bool
    projected: bool

    @classmethod
    def checked(cls, *args: Any) -> Arguments:
        """Arguments that fit together.

        Raises:
            ValueError: shapes, dtypes or names that do not.
        """
        a = cls(*args)
        reference.check(a.x, a.features, a.prototypes, *a.coefficients, a.negative, a.bias, a.projected)
        reference.check_names(*a.names)
        return a

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The eight tensors, None where there is none."""
        return tuple(getattr(self, field.name) for field in fields(self)[:TENSORS])

    @property
    def coefficients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.theta, self.alpha, self.beta

    @property
    def names(self) -> Names:
        return Names(self.intersection, self.convention, self.difference, self.form)
