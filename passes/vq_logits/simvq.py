# SPDX-License-Identifier: Apache-2.0
"""SimVQ: a codebook trained through one linear map of all its codes, C A instead of C (Zhu et al., arXiv 2411.02038).

    codebook = C A,   A = I at first, C as it was fitted (frozen unless asked otherwise)

Gradients of a codebook reach only the codes that some token of the batch uses; the others stay behind and die. Through A
every code moves with every step. Product and residual codebooks get one A per group or stage. For inference A is merged:
the product is the codebook, and the head is the ordinary one again.

    simvq.reparameterise(model.lm_head)
    ...                                     # train
    simvq.merge(model.lm_head)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ROLE = "codebook"


class LinearCodes(nn.Module):
    """C ``[..., K, w]`` -> C A with the parameter A ``[..., w, w]``, the identity at first."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        identity = torch.eye(codebook.shape[-1], dtype=codebook.dtype, device=codebook.device)
        self.linear = nn.Parameter(identity.expand(*codebook.shape[:-2], -1, -1).clone())

    def forward(self, codebook: Tensor) -> Tensor:
        return codebook @ self.linear


def reparameterise(head: nn.Module, *, train_codes: bool = False) -> nn.Module:
    """Train the head's codebook as C A from here on; the head's outputs do not change, to the bit.

    Args:
        head: a module of `passes.vq_logits.modules` (anything with a floating parameter ``codebook`` ``[..., K, w]``).
        train_codes: train C too; the paper keeps it frozen.

    Returns:
        The same module; its trainable parameter is ``parametrizations.codebook.0.linear``.

    Raises:
        ValueError: the head has no such parameter, or it is reparameterised already.
    """
    if parametrize.is_parametrized(head, _ROLE):
        raise ValueError(f"the codebook of {type(head).__name__} is reparameterised already; merge it first")
    codebook = dict(head.named_parameters(recurse=False)).get(_ROLE)
    if codebook is None or codebook.dim() < 2:
        raise ValueError(f"{type(head).__name__} has no parameter 'codebook' [..., K, w] to reparameterise")
    parametrize.register_parametrization(head, _ROLE, LinearCodes(codebook.detach()))
    head.get_parameter(f"parametrizations.{_ROLE}.original").requires_grad_(train_codes)
    return head


def merge(head: nn.Module) -> nn.Module:
    """Put C A in the codebook's place, as a plain trainable parameter; the head's outputs do not change, to the bit.

    The product is no longer a half-precision number, so the stored codebook takes the bytes of its own dtype.

    Raises:
        ValueError: the head's codebook is not reparameterised.
    """
    if not parametrize.is_parametrized(head, _ROLE):
        raise ValueError(f"the codebook of {type(head).__name__} is not reparameterised; there is nothing to merge")
    value = getattr(head, _ROLE).detach().clone()
    parametrize.remove_parametrizations(head, _ROLE, leave_parametrized=False)
    setattr(head, _ROLE, nn.Parameter(value))
    return head
