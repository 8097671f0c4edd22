# SPDX-License-Identifier: Apache-2.0
"""A rewritten attention inside the user's own model: transformers calls it through its AttentionInterface.

The core hangs below the attention module it belongs to, as ``<attention>.linear_attention``. The model's attention
implementation becomes `IMPLEMENTATION`: modules with a core run it, the others transformers' own sdpa.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewriter.errors import PlanError
from rewriter.passes.linear_attention.form import Form

IMPLEMENTATION = "rewriter_linear_attention"
CHILD = "linear_attention"


class LinearAttentionCore(nn.Module):
    """Linear attention with a softmax window, on queries, keys and values that are projected already.

    Args:
        form: everything that is no tensor.
        tensors: the parameters by role.

    Attributes:
        state: None: a call sees whole sequences. Otherwise what the tokens so far have left behind, ``()`` at the start
            (see `rewriter.decoding.Stateful`): a call gets the new tokens alone, and the state is replaced.
    """

    state: tuple[Tensor, ...] | None

    def __init__(self, form: Form, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.form = form
        self.state = None
        for role in form.roles:
            value = tensors[role]
            if role in form.buffers:
                self.register_buffer(role, value)
                continue
            self.register_parameter(role, value if isinstance(value, nn.Parameter) else nn.Parameter(value))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        """``[B, H, T, Dv]`` for q ``[B, H, T, D]``, k ``[B, Hk, S, D]``, v ``[B, Hk, S, Dv]``, keep bool ``[B, S]``.

        Where there are more keys than queries, the queries are the last ones (a cache of keys holds the others).
        """
        if self.state is not None:
            out, self.state = self.advance(self.state or None, q, k, v, keep)
            return out
        missing = k.shape[2] - q.shape[2] if self.form.causal else 0
        if missing > 0:
            q = nn.functional.pad(q, (0, 0, missing, 0))
        out = self.form.call(q, k, v, keep, self._tensors())[0]
        return out[:, :, missing:]

    def advance(
        self, state: tuple[Tensor, ...] | None, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output for new tokens after those that left ``state`` behind, and what they leave; constant size.

        Raises:
            PlanError: the attention is not causal.
        """
        if not self.form.causal:
            raise PlanError("only causal attention has a state that tokens are added to")
        out, *left = self.form.call(q, k, v, keep, self._tensors(), past=state, with_state=True)
        return out, tuple(left)

    def _tensors(self) -> dict[str, Tensor]:
        return {role: getattr(self, role) for role in self.form.roles}

    def extra_repr(self) -> str:
        form = self.form
        return f"heads={form.heads}, feature_map={form.feature_map}, window={form.window}, block={form.block}"


def attach(root: nn.Module, path: str, core: nn.Module) -> bool:
    """Hang the core below the module at ``path`` and route the model's attention through it.

    Raises:
        PlanError: the model is none of transformers', or does not call its attention through the AttentionInterface.
    """
    implementation = getattr(getattr(root, "config", None), "_attn_implementation", None)
    if implementation is None or not hasattr(root, "set_attn_implementation"):
        raise PlanError(
            f"the attention at {path!r} can go back into transformers models only, through their AttentionInterface; "
            "keep using opt, or opt.undo it"
        )
    _register()
    root.get_submodule(path).add_module(CHILD, core)
    if implementation != IMPLEMENTATION:
        cast(Any, root).set_attn_implementation(IMPLEMENTATION)
        if cast(Any, root).config._attn_implementation != IMPLEMENTATION:
            raise PlanError(f"{type(root).__name__} does not let its attention implementation be set")
    return True


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[B, T, H, Dv]`` of ``[B, heads, T, D]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    core = getattr(module, CHILD, None)
    if core is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return result
    keep = None
    if attention_mask is not None:
        # What the last query sees is what is no padding: causal or not, everything else lies before it.
        keep = attention_mask[:, 0, -1, :] if attention_mask.dtype == torch.bool else attention_mask[:, 0, -1, :] == 0
        keep = keep.expand(query.shape[0], -1)[:, -key.shape[2] :]
    out = core(query, key, value, keep)
    if dropout:
        out = nn.functional.dropout(out, dropout)
    return out.transpose(1, 2).contiguous(), None
