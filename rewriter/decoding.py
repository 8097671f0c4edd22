# SPDX-License-Identifier: Apache-2.0
"""`DecodeState`: token by token with memory that does not grow where attention was rewritten to have a state.

    state = DecodeState(opt)
    logits = state.prefill(prompt)          # [batch, length, V]
    logits = state.step(next_token)         # [batch, V]

The model runs as its own class (:meth:`rewriter.Optimized.to_module`) with a cache whose layers are of two kinds. A
rewritten attention keeps a state of constant size; it is any module with ``advance`` and ``state`` (see `Stateful`)
below an attention module that says its ``layer_idx``. Attentions that are still softmax keep all keys and values, as
transformers does: memory then grows with every token, at these layers only.

Where all attentions have states, single tokens do without the class: they run as straight code from the rewritten
graph (`rewriter.stepping`), with the same states and the same logits up to rounding.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from rewriter.errors import PlanError, RewriterError
from rewriter.optimized import Optimized
from rewriter.stepping import Steps

_log = logging.getLogger("rewriter")


@runtime_checkable
class Stateful(Protocol):
    """What a rewritten attention offers.

    Attributes:
        state: None: calls are independent of each other. Otherwise what the tokens so far have left behind, ``()`` at
            the start of a sequence: calls continue it, and replace it.
    """

    state: tuple[Tensor, ...] | None

    def advance(
        self, state: tuple[Tensor, ...] | None, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output for new tokens, and the state after them. Raises PlanError where there is none."""


class DecodeState:
    """The state of one batch of sequences of a causal language model of transformers.

    Args:
        model: a rewritten model, or what its ``to_module()`` returned. A rewritten model is brought into its class
            once, here: parameters that are written to later are not seen. A module must not be called by others
            while it decodes.

    Attributes:
        length: tokens seen so far, padding included.
        by_class: why single tokens run through the model's class; "" where they do not. Known from the first step on,
            which captures their graph: as long as capturing the model took, once per model.

    Raises:
        PlanError: there is no class to go back to, or it takes no cache.
    """

    def __init__(self, model: Optimized | nn.Module) -> None:
        module = model.to_module() if isinstance(model, Optimized) else model
        layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        if layers is None or not hasattr(module, "generate"):
            raise PlanError(
                f"DecodeState needs a causal language model of transformers; {type(module).__name__} is none. "
                "Call the operators' own states, or decode with the whole sequence each time"
            )
        self._module = module
        found = _stateful(module)
        self._stateful = {index: child for _, index, child in found}
        self._layers = int(layers)
        self._steps: Steps | None = None
        self.by_class = "a module was given, which has no graph"
        if isinstance(model, Optimized):
            self.by_class = "" if self.constant else "some attentions keep all keys and values"
            self._steps = Steps(model, {path: index for path, index, _ in found}) if self.constant else None
        self.reset()

    @property
    def constant(self) -> bool:
        """Whether memory stays the same whatever the length: every attention has a state."""
        return len(self._stateful) == self._layers

    @property
    def nbytes(self) -> int:
        """Bytes held for the sequences so far."""
        held = [tensor for layer in self._states.values() for tensor in layer]
        held += [x for layer in self._cache.layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    def reset(self) -> None:
        """Forget the sequences."""
        self.length = 0
        self._states: dict[int, tuple[Tensor, ...]] = dict.fromkeys(self._stateful, ())
        self._cache = _cache(self._layers, frozenset(self._stateful), self.constant)
        self._mask: Tensor | None = None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk: int = 512) -> Tensor:
        """Logits ``[batch, length, V]`` of a prompt int64 ``[batch, length]``; the state then stands at its end.

        Args:
            attention_mask: ``[batch, length]``, 0 at padding, which must be on the left.
            chunk: tokens per pass through the model: bounds the memory of long prompts.

        Raises:
            PlanError: there are tokens already, or padding on the right.
        """
        if self.length:
            raise PlanError(f"the state already holds {self.length} tokens; call reset() first, or step()")
        if attention_mask is not None:
            if bool((attention_mask.long().diff(dim=-1) < 0).any()):
                raise PlanError("padding must be on the left: a state cannot take back tokens that it has seen")
            self._mask = None if bool(attention_mask.all()) else attention_mask.long()
        parts = []
        for start in range(0, input_ids.shape[1], chunk):
            ids = input_ids[:, start : start + chunk]
            mask = None if self._mask is None else self._mask[:, : start + ids.shape[1]]
            parts.append(self._run(ids, mask))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, V]`` after one more token of each sequence, int64 ``[batch]`` or ``[batch, 1]``."""
        ids = tokens.reshape(-1, 1)
        if (logits := self._straight(ids)) is not None:
            return logits[:, -1]
        mask = None
        if self._mask is not None and not self.constant:  # layers with all keys must know which are padding
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
            mask = self._mask
        return self._run(ids, mask)[:, -1]

    def _straight(self, ids: Tensor) -> Tensor | None:
        """Logits ``[batch, 1, V]`` by straight code; None where it cannot be, or there is no state to go on from."""
        if self._steps is None or not self.length or torch.is_autocast_enabled(ids.device.type):
            return None
        try:
            logits, self._states = self._steps.run(ids, self.length, self._states)
        except RewriterError as reason:
            self._steps, self.by_class = None, str(reason)
            _log.info("single tokens are decoded by the model's class: %s", reason)
            return None
        for layer in self._cache.layers:
            layer.count += 1
        self.length += 1
        return logits

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        for index, core in self._stateful.items():
            core.state = self._states[index]
        try:
            result = self._module(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True)
            self._states = {index: core.state or () for index, core in self._stateful.items()}
        finally:
            for core in self._stateful.values():
                core.state = None
        self.length += ids.shape[1]
        logits: Tensor = result.logits
        return logits


def _stateful(module: nn.Module) -> list[tuple[str, int, Stateful]]:
    """(path, layer index, module with a state) of every rewritten attention."""
    return [
        (path, int(cast(Any, owner).layer_idx), child)
        for path, owner in module.named_modules()
        if getattr(owner, "layer_idx", None) is not None
        for child in owner.children()
        if isinstance(child, Stateful)
    ]


def _cache(layers: int, stateful: frozenset[int], constant: bool) -> Any:
    """transformers' cache, with layers that keep nothing where attention has a state of its own."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Counting(DynamicLayer):
        """Counts tokens, so that positions are right, and hands on the new keys and values alone."""

        count = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.count += key_states.shape[-2]
            return key_states, value_states

        def get_seq_length(self) -> int:
            return self.count

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            # The mask is one for all layers: that of the new tokens alone, unless some layer has all keys.
            return (query_length, self.count) if constant else (self.count + query_length, 0)

    kinds: list[Any] = [Counting if index in stateful else DynamicLayer for index in range(layers)]
    return Cache(layers=[kind() for kind in kinds])
