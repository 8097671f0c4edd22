# SPDX-License-Identifier: Apache-2.0
"""Example inputs: inferred where the model says what it takes, and made general enough to be captured once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import CaptureError

_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def signature(model: nn.Module) -> tuple[tuple[str, ...], frozenset[str]]:
    """(names of positional parameters, names whose default is None) of the model's forward."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return (), frozenset()
    positional = tuple(p.name for p in parameters if p.kind in _KINDS)
    return positional, frozenset(p.name for p in parameters if p.default is None)


def by_name(
    names: Sequence[str], optional: frozenset[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One spelling for one call: everything by keyword, in one order, without what is None by default.

    Raises:
        TypeError: an argument is given twice.
    """
    if len(args) > len(names):
        return args, {k: kwargs[k] for k in sorted(kwargs)}
    named = dict(zip(names, args, strict=False))
    for name in kwargs:
        if name in named:
            raise TypeError(f"got multiple values for argument {name!r}")
    named |= kwargs
    order = [k for k in names if k in named] + sorted(k for k in named if k not in names)
    return (), {k: named[k] for k in order if not (named[k] is None and k in optional)}


def infer(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example ``(args, kwargs)`` for a model that came without.

    In this order: what the model declares (transformers' ``dummy_inputs``, Lightning's ``example_input_array``), then
    an input for its first layer where tracing shows that the input goes there and nowhere else.

    Raises:
        CaptureError: neither is possible; the message shows the call to write.
    """
    if (declared := getattr(model, "example_input_array", None)) is not None:
        return (
            (declared, {})
            if isinstance(declared, tuple)
            else ((), declared)
            if isinstance(declared, dict)
            else ((declared,), {})
        )
    if hasattr(model, "dummy_inputs") and hasattr(model, "config"):
        return (), _transformers_inputs(model)
    if (first := _input_of_first_layer(model)) is not None:
        return (first,), {}
    names, _ = signature(model)
    raise CaptureError(
        f"{type(model).__name__} does not say what inputs it takes; write "
        f"rewriter.optimize(model, example_inputs=({', '.join(names) or 'x'},), …) with tensors of the real shapes and dtypes "
        "(on the command line: --example-inputs FILE)"
    )


def _transformers_inputs(model: Any) -> dict[str, Any]:
    """What the model's kind takes: an image, sound and text, an image and text, or what it declares."""
    names, _ = signature(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    text = getattr(model.config, "text_config", model.config)
    vocabulary = getattr(text, "vocab_size", None) or 8
    ids = {k: (v % vocabulary).to(device) for k, v in dict(model.dummy_inputs).items() if isinstance(v, Tensor)}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return {"pixel_values": _image(model, device)}
    if main == "input_features" and "decoder_input_ids" in names:
        return {"input_features": _sound(model, device), "decoder_input_ids": ids["input_ids"]}
    if hasattr(model, "get_text_features") and "pixel_values" in names:  # two encoders side by side
        ids["pixel_values"] = _image(model, device, len(ids["input_ids"]))
    return add_mask(names, ids)


def _image(model: Any, device: torch.device, count: int = 2) -> Tensor:
    """Zeros [count, channels, height, width] of the size the model is configured for."""
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
    return torch.zeros(count, config.num_channels, *size, dtype=_dtype(model), device=device)


def _sound(model: Any, device: torch.device) -> Tensor:
    """Zeros [rows, mel bins, frames]: convolutions of stride 2 make one position of two frames.

    As many rows as transformers' dummy ids have, which are the decoder's part of the call.
    """
    config, rows = model.config, len(model.dummy_inputs["input_ids"])
    frames = 2 * config.max_source_positions
    return torch.zeros(rows, config.num_mel_bins, frames, dtype=_dtype(model), device=device)


def _dtype(model: Any) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def add_mask(names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """With an all-ones ``attention_mask``, if the model takes one, so that its padding logic is in the graph."""
    ids = kwargs.get("input_ids")
    if "attention_mask" in names and isinstance(ids, Tensor) and kwargs.get("attention_mask") is None:
        return {**kwargs, "attention_mask": torch.ones_like(ids)}
    return kwargs


def _input_of_first_layer(model: nn.Module) -> Tensor | None:
    """An input for the one layer that reads the model's only input, if tracing shows there is one such layer."""
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception:  # tracing runs the user's code on proxies: whatever it raises means "cannot tell"
        return None
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1 or len(placeholders[0].users) != 1:
        return None
    reader = next(iter(placeholders[0].users))
    if reader.op != "call_module":
        return None
    layer = model.get_submodule(str(reader.target))
    weight = next(iter(layer.parameters()), None)
    if weight is None:
        return None
    if isinstance(layer, nn.Linear):
        return torch.zeros(2, layer.in_features, dtype=weight.dtype, device=weight.device)
    if isinstance(layer, nn.Embedding):
        return torch.zeros(2, 2, dtype=torch.long, device=weight.device)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(layer.padding, str):
        sizes = [max(32, d * (k - 1) + 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return torch.zeros(2, layer.in_channels, *sizes, dtype=weight.dtype, device=weight.device)
    return None


def _sequence_dims(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions that count examples or positions: batch, and the sequence of token-like or embedding-like inputs."""
    if tensor.dim() == 0:
        return ()
    is_sequence = (tensor.dim() == 2 and not tensor.is_floating_point()) or tensor.dim() == 3
    return (0, 1) if is_sequence else (0,)


def broadcast(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """(tensor, dimension) pairs of size 1 beside another tensor with more: such a 1 means "the same for all"."""
    found = []
    for d in (0, 1):
        counted = [i for i, t in enumerate(tensors) if d in _sequence_dims(t)]
        ones = [i for i in counted if tensors[i].shape[d] == 1]
        if len(ones) < len(counted):
            found += [(i, d) for i in ones]
    return tuple(found)


def enlarge(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Repeat examples of size 1 to size 2: export would otherwise take the 1 for a constant of the model."""
    fixed = set(broadcast(tensors))
    return tuple(
        _enlarge(t, [d for d in _sequence_dims(t) if t.shape[d] == 1 and (i, d) not in fixed])
        for i, t in enumerate(tensors)
    )


def _enlarge(tensor: Tensor, dims: list[int]) -> Tensor:
    for d in dims:
        tensor = torch.cat([tensor, tensor], d)
    return tensor
