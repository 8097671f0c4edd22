# SPDX-License-Identifier: Apache-2.0
"""References of the ShiftAdd operators in plain aten, the checks shared with the fakes, and scale gradients.

Weights are decoded in fp32 (fp64 if the activations or the scales are fp64), cast to the activations' dtype
and multiplied as a dense layer would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.shift_add import codec

# ---------------------------------------------------------------------------------- checks


def _check(condition: bool, message: str) -> None:
    torch._check_value(condition, lambda: f"shift_add: {message}")


def check_groups(group: int, in_features: int) -> None:
    _check(in_features >= 1, f"in_features must be at least 1, got {in_features}")
    _check(group >= 1, f"group must be at least 1, got {group}")


def check_bcq(codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int) -> None:
    """Refuse BCQ codes, scales and shifts whose shapes or dtypes do not fit together (ValueError)."""
    check_groups(group, in_features)
    nbytes, count = codec.ceil_div(in_features, 8), codec.ceil_div(in_features, group)
    _check(codes.dtype == torch.uint8, f"codes must be uint8, got {codes.dtype}")
    _check(codes.dim() == 3, f"codes must be [out, bits, bytes], got {codes.dim()} dimensions")
    out, bits = codes.shape[0], codes.shape[1]
    _check(1 <= bits <= codec.MAX_BASES, f"1 to {codec.MAX_BASES} bases are supported, codes have {bits}")
    _check(
        codes.shape[2] == nbytes,
        f"codes need {nbytes} bytes for in_features={in_features}, got {codes.shape[2]}",
    )
    expected = (out, count) if shift is not None else (out, count, bits)
    _check_scale(scale, expected)
    if shift is not None:
        packed = (out, count, codec.ceil_div(bits, 2))
        _check(shift.dtype == torch.uint8, f"shift must be uint8, got {shift.dtype}")
        _check(_same_shape(shift, packed), f"shift must be {list(packed)}, got {list(shift.shape)}")


def check_pot(codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int) -> None:
    """Refuse PoT codes and scales whose shapes, dtypes or settings do not fit together (ValueError)."""
    check_groups(group, in_features)
    reason = pot_settings_fault(bits, terms)
    _check(reason is None, str(reason))
    nbytes, count = codec.ceil_div(in_features * bits, 8), codec.ceil_div(in_features, group)
    _check(codes.dtype == torch.uint8, f"codes must be uint8, got {codes.dtype}")
    _check(codes.dim() == 2, f"codes must be [out, bytes], got {codes.dim()} dimensions")
    _check(
        codes.shape[1] == nbytes,
        f"codes need {nbytes} bytes for in_features={in_features} at {bits} bits, got {codes.shape[1]}",
    )
    _check_scale(scale, (codes.shape[0], count))


def check_levels(codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int) -> None:
    """Refuse level codes, scales and tables whose shapes or dtypes do not fit together (ValueError)."""
    check_groups(group, in_features)
    _check(1 <= bits <= codec.MAX_LEVEL_BITS, f"bits={bits} must be 1 to {codec.MAX_LEVEL_BITS} bits per code word")
    nbytes, count = codec.ceil_div(in_features * bits, 8), codec.ceil_div(in_features, group)
    _check(codes.dtype == torch.uint8, f"codes must be uint8, got {codes.dtype}")
    _check(codes.dim() == 2, f"codes must be [out, bytes], got {codes.dim()} dimensions")
    _check(
        codes.shape[1] == nbytes,
        f"codes need {nbytes} bytes for in_features={in_features} at {bits} bits, got {codes.shape[1]}",
    )
    _check_scale(scale, (codes.shape[0], count))
    _check(levels.is_floating_point(), f"levels must be floating, got {levels.dtype}")
    _check(_same_shape(levels, (1 << bits,)), f"levels must be [{1 << bits}], got {list(levels.shape)}")


def pot_settings_fault(bits: int, terms: int) -> str | None:
    """Why ``bits`` and ``terms`` contradict each other, or None where they fit."""
    if terms < 1:
        return f"terms must be at least 1, got {terms}"
    if bits % terms:
        return f"bits={bits} does not divide into terms={terms} equal sub-fields; make bits a multiple of terms"
    if bits // terms < 2:
        return (
            f"bits={bits} leaves {bits // terms} bit for each of terms={terms}; a signed power of two "
            "needs at least 2, a sign and a magnitude"
        )
    if bits > codec.MAX_POT_BITS:
        return f"bits={bits} is more than the {codec.MAX_POT_BITS} bits a power-of-two weight may take"
    if bits // terms > codec.MAX_FIELD_BITS:
        return f"bits={bits} gives terms={terms} sub-fields above {codec.MAX_FIELD_BITS} bits; raise terms"
    return None


def _check_scale(scale: Tensor, expected: tuple[int, ...]) -> None:
    _check(scale.is_floating_point(), f"scale must be floating, got {scale.dtype}")
    _check(_same_shape(scale, expected), f"scale must be {list(expected)}, got {list(scale.shape)}")


def _same_shape(tensor: Tensor, expected: tuple[int, ...]) -> bool:
    return tensor.dim() == len(expected) and all(a == b for a, b in zip(tensor.shape, expected, strict=True))


def check_linear(x: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> None:
    """Refuse activations or a bias that do not fit the weight (ValueError)."""
    _check(x.is_floating_point(), f"x must be floating, got {x.dtype}")
    _check(x.dim() >= 1, "x must have at least one dimension")
    _check(x.shape[-1] == in_features, f"x has {x.shape[-1]} features, the weight in_features={in_features}")
    if bias is not None:
        _check(bias.is_floating_point(), f"bias must be floating, got {bias.dtype}")
        _check(_same_shape(bias, (out_features,)), f"bias must be [{out_features}], got {list(bias.shape)}")


def check_ids(ids: Tensor) -> None:
    """Refuse indices that are not int32 or int64 (ValueError)."""
    _check(ids.dtype in (torch.int32, torch.int64), f"ids must be int32 or int64, got {ids.dtype}")


# ---------------------------------------------------------------------------------- references


def bcq_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    """``x @ W.T + bias``, W[o, i] = Σ_b alpha[o, i//group, b] · ±1; ``[..., out]`` in x's dtype."""
    check_bcq(codes, scale, shift, group, in_features)
    check_linear(x, bias, codes.shape[0], in_features)
    weight = codec.decode_bcq(codes, scale, shift, group, in_features, codec.compute_dtype(x, scale))
    return _linear(x, weight, bias)


def bcq_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """Rows of W by index, decoding only these; ``[...] -> [..., in_features]`` in the scales' dtype."""
    check_bcq(codes, scale, shift, group, in_features)
    check_ids(ids)
    flat = ids.flatten()
    rows = codec.decode_bcq(
        codes.index_select(0, flat),
        scale.index_select(0, flat),
        None if shift is None else shift.index_select(0, flat),
        group,
        in_features,
        codec.compute_dtype(scale),
    )
    return _rows(rows, ids, scale, in_features)


def pot_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    terms: int,
    group: int,
    in_features: int,
) -> Tensor:
    """``x @ W.T + bias``, W[o, i] = scale[o, i//group] · Σ_t v_t, v_t 0 or ±2**-e; output in x's dtype."""
    check_pot(codes, scale, bits, terms, group, in_features)
    check_linear(x, bias, codes.shape[0], in_features)
    weight = codec.decode_pot(codes, scale, bits, terms, group, in_features, codec.compute_dtype(x, scale))
    return _linear(x, weight, bias)


def pot_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """Rows of W by index, decoding only these; ``[...] -> [..., in_features]`` in the scales' dtype."""
    check_pot(codes, scale, bits, terms, group, in_features)
    check_ids(ids)
    flat = ids.flatten()
    rows = codec.decode_pot(
        codes.index_select(0, flat),
        scale.index_select(0, flat),
        bits,
        terms,
        group,
        in_features,
        codec.compute_dtype(scale),
    )
    return _rows(rows, ids, scale, in_features)


def level_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """``x @ W.T + bias``, W[o, i] = scale[o, i//group] · levels[word_i]; ``[..., out]`` in x's dtype."""
    check_levels(codes, scale, levels, bits, group, in_features)
    check_linear(x, bias, codes.shape[0], in_features)
    dtype = codec.compute_dtype(x, scale, levels)
    return _linear(x, codec.decode_levels(codes, scale, levels, bits, group, in_features, dtype), bias)


def level_embedding(
    ids: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> Tensor:
    """Rows of W by index, decoding only these; ``[...] -> [..., in_features]`` in the scales' dtype."""
    check_levels(codes, scale, levels, bits, group, in_features)
    check_ids(ids)
    flat = ids.flatten()
    chosen, scales = codes.index_select(0, flat), scale.index_select(0, flat)
    dtype = codec.compute_dtype(scale, levels)
    return _rows(codec.decode_levels(chosen, scales, levels, bits, group, in_features, dtype), ids, scale, in_features)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _rows(rows: Tensor, ids: Tensor, scale: Tensor, in_features: int) -> Tensor:
    return rows.to(scale.dtype).reshape(*ids.shape, in_features).contiguous()


# ---------------------------------------------------------------------------------- gradients


def bcq_scale_gradient(
    grad_weight: Tensor, codes: Tensor, shift: Tensor | None, group: int, in_features: int
) -> Tensor:
    """Gradient of the scales from that of the decoded rows ``[n, in]``.

    ∂L/∂alpha[o, g, b] = Σ_{i in g} ∂L/∂w[o, i] · ±1; under power-of-two scales
    ∂L/∂scale[o, g] = Σ_b 2^-k_b · ∂L/∂alpha[o, g, b].
    """
    bits = codes.shape[-2]
    grad = codec.to_groups(grad_weight, group, in_features)
    planes = [(grad * codec.bcq_signs(codes, b, group, in_features, grad.dtype)).sum(-1) for b in range(bits)]
    alpha = torch.stack(planes, dim=-1)
    if shift is None:
        return alpha
    return (alpha * codec.bcq_factors(shift, bits, grad_weight.dtype)).sum(-1)


def pot_scale_gradient(
    grad_weight: Tensor, codes: Tensor, bits: int, terms: int, group: int, in_features: int
) -> Tensor:
    """Gradient of the scales from that of the decoded rows: ∂L/∂scale = Σ_{i in g} ∂L/∂w · w / scale."""
    unit = codec.decode_pot_unit(codes, bits, terms, in_features, grad_weight.dtype)
    return codec.to_groups(grad_weight * unit, group, in_features).sum(-1)


def level_gradients(
    grad_weight: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, bits: int, group: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the scales and of the table from that of the decoded rows ``[n, in]``.

    ∂L/∂scale[o, g] = Σ_{i in g} ∂L/∂w[o, i] · levels[word_i],
    ∂L/∂levels[c] = Σ_{o, i: word = c} ∂L/∂w[o, i] · scale[o, g(i)].
    """
    dtype = grad_weight.dtype
    words = codec.unpack_stream(codes, bits, in_features)
    unit = levels.to(dtype).index_select(0, words.flatten()).view(words.shape)
    grad_scale = codec.to_groups(grad_weight * unit, group, in_features).sum(-1)
    per_weight = codec.to_groups(grad_weight, group, in_features) * scale.to(dtype).unsqueeze(-1)
    scaled = codec.from_groups(per_weight, in_features).flatten()
    table = torch.zeros(1 << bits, dtype=dtype, device=grad_weight.device)
    return grad_scale, table.index_add(0, words.flatten(), scaled)
