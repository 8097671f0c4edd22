# SPDX-License-Identifier: Apache-2.0
"""The operators patterns are written with, each under all the spellings the training IR has for it.

``+ - * / ** @`` and unary minus are written as such on expressions; everything else is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from rewriter.expressions import Operator, add, div, matmul, mul, neg, power, rsub, sub
from rewriter.facts import Facts, same_shape
from rewriter.pattern import Transparent

__all__ = [
    "ALIAS", "CONTIGUOUS", "DETACH", "EVAL_DROPOUT", "NOOP_CAST", "NOOP_SHAPE", "VALUE_PRESERVING", "add", "addmm",
    "amax", "baddbmm", "cast", "cat", "chunk", "cross_entropy", "div", "dropout", "embedding", "erf", "exp", "expand",
    "flatten", "gather", "gelu", "layer_norm", "linear", "log", "log_softmax", "logsumexp", "masked_fill", "matmul",
    "mean", "mul", "ndtr", "neg", "nll_loss", "power", "relu", "repeat_interleave", "reshape", "rms_norm", "rsqrt",
    "rsub", "sdpa", "select", "sigmoid", "silu", "softmax", "sqrt", "square", "squeeze", "stack", "sub", "swap_last",
    "take", "tanh", "total", "unsqueeze", "where",
]  # fmt: skip

aten = torch.ops.aten

_CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
_SWAPS = (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default)


def _read_cast(facts: Facts, node: Node) -> Mapping[str, Any] | str:
    """``x`` and the dtype it is cast to; a move to another device, layout or memory format is no cast."""
    arguments = facts.arguments(node)
    value = arguments["self"]
    if facts.device(value) != facts.device(node):
        return f"moves the tensor to {facts.device(node)}"
    if arguments.get("layout") not in (None, torch.strided):
        return f"changes the layout to {arguments['layout']}"
    if arguments.get("memory_format") not in (None, torch.preserve_format):
        return f"changes the memory format to {arguments['memory_format']}"
    dtype = facts.dtype(node)
    return "its dtype is not known" if dtype is None else {"x": value, "dtype": dtype}


def _read_swap(facts: Facts, node: Node) -> Mapping[str, Any] | str:
    """``x`` of xᵀ, the last two dimensions exchanged."""
    arguments = facts.arguments(node)
    shape = facts.shape(node)
    if shape is None or len(shape) < 2:
        return "it has fewer than two dimensions"
    rank = len(shape)
    order = list(range(rank))
    if node.target is aten.transpose.int:
        first, second = (arguments[d] % rank for d in ("dim0", "dim1"))
        order[first], order[second] = order[second], order[first]
    elif node.target is aten.permute.default:
        order = [d % rank for d in arguments["dims"]]
    elif node.target is aten.numpy_T.default:
        order.reverse()
    else:
        order[-2:] = order[-1], order[-2]
    if order != [*range(rank - 2), rank - 1, rank - 2]:
        return f"it orders the dimensions {order}"
    return {"x": arguments["self"]}


# x W^T + b, and b + x W with the weight stored [in, out] (transformers' Conv1D)
linear = Operator("linear", (aten.linear.default,), ("x", "weight", "bias"))
addmm = Operator("addmm", (aten.addmm.default,), ("bias", "x", "weight"))
baddbmm = Operator("baddbmm", (aten.baddbmm.default,), ("bias", "x", "y", "beta", "alpha"))
embedding = Operator("embedding", (aten.embedding.default,), ("weight", "ids", "padding_idx"))

# softmax(x, dim), computed in `dtype` where one is given
softmax = Operator("softmax", (aten.softmax.int,), ("x", "dim", "dtype"), casts=True)
log_softmax = Operator("log_softmax", (aten.log_softmax.int,), ("x", "dim", "dtype"), casts=True)
logsumexp = Operator("logsumexp", (aten.logsumexp.default,), ("x", "dim", "keepdim"))
nll_loss = Operator(
    "nll_loss",
    (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default),
    ("x", "target", "weight", "reduction", "ignore_index"),
)
cross_entropy = Operator(
    "cross_entropy",
    (aten.cross_entropy_loss.default,),
    ("x", "target", "weight", "reduction", "ignore_index", "label_smoothing"),
)
sdpa = Operator(
    "scaled_dot_product_attention",
    (aten.scaled_dot_product_attention.default,),
    ("q", "k", "v", "mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
)
dropout = Operator("dropout", (aten.dropout.default,), ("x", "p", "train"))
layer_norm = Operator("layer_norm", (aten.layer_norm.default,), ("x", "shape", "weight", "bias", "eps", "cudnn"))
rms_norm = Operator("rms_norm", (aten.rms_norm.default,), ("x", "shape", "weight", "eps"))
mean = Operator("mean", (aten.mean.dim,), ("x", "dim", "keepdim", "dtype"), casts=True)
total = Operator("sum", (aten.sum.dim_IntList,), ("x", "dim", "keepdim", "dtype"), casts=True)
amax = Operator("amax", (aten.amax.default,), ("x", "dim", "keepdim"))

exp = Operator("exp", (aten.exp.default,), ("x",))
log = Operator("log", (aten.log.default,), ("x",))
erf = Operator("erf", (aten.erf.default, aten.special_erf.default), ("x",))
ndtr = Operator("normal distribution function", (aten.special_ndtr.default,), ("x",))
gelu = Operator("gelu", (aten.gelu.default,), ("x", "approximate"))
relu = Operator("relu", (aten.relu.default,), ("x",))
rsqrt = Operator("rsqrt", (aten.rsqrt.default,), ("x",))
sqrt = Operator("sqrt", (aten.sqrt.default,), ("x",))
square = Operator("square", (aten.square.default,), ("x",))
sigmoid = Operator("sigmoid", (aten.sigmoid.default,), ("x",))
silu = Operator("silu", (aten.silu.default,), ("x",))
tanh = Operator("tanh", (aten.tanh.default,), ("x",))

cat = Operator("cat", (aten.cat.default,), ("tensors", "dim"))
expand = Operator("expand", (aten.expand.default,), ("x", "size"))
reshape = Operator("reshape", (aten.reshape.default, aten.view.default, aten._unsafe_view.default), ("x", "shape"))
repeat_interleave = Operator("repeat_interleave", (aten.repeat_interleave.self_int,), ("x", "repeats", "dim"))
gather = Operator("gather", (aten.gather.default,), ("x", "dim", "index"))
select = Operator("select", (aten.select.int,), ("x", "dim", "index"))
squeeze = Operator("squeeze", (aten.squeeze.dim,), ("x", "dim"))
masked_fill = Operator("masked_fill", (aten.masked_fill.Scalar, aten.masked_fill.Tensor), ("x", "mask", "value"))
where = Operator("where", (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), ("condition", "x", "y"))
take = Operator("slice", (aten.slice.Tensor,), ("x", "dim", "start", "end", "step"))
stack = Operator("stack", (aten.stack.default,), ("tensors", "dim"), new_dims=1)
flatten = Operator("flatten", (aten.flatten.using_ints,), ("x", "start_dim", "end_dim"))
chunk = Operator("chunk", (aten.chunk.default,), ("x", "chunks", "dim"))
unsqueeze = Operator("unsqueeze", (aten.unsqueeze.default,), ("x", "dim"), new_dims=1)
cast = Operator("cast", _CASTS, ("x", "dtype"), casts=True, read=_read_cast)
swap_last = Operator("transpose of the last two dimensions", _SWAPS, ("x",), read=_read_swap)


def _same_type(facts: Facts, node: Node) -> bool:
    read = _read_cast(facts, node)
    return not isinstance(read, str) and facts.dtype(read["x"]) == read["dtype"]


def _same_shape(facts: Facts, node: Node) -> bool:
    return same_shape(facts.shape(node), facts.shape(node.all_input_nodes[0]))


NOOP_CAST = Transparent("a cast to the same dtype", frozenset(_CASTS), _same_type)
EVAL_DROPOUT = Transparent(
    "dropout that drops nothing",
    frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}),
    lambda facts, node: not facts.is_random(node),
)
CONTIGUOUS = Transparent("a copy", frozenset({aten.contiguous.default, aten.clone.default}), lambda facts, node: True)
NOOP_SHAPE = Transparent(
    "a reshape that keeps the shape",
    frozenset({aten.slice.Tensor, aten.reshape.default, aten.view.default, aten.expand.default}),
    _same_shape,
)
ALIAS = Transparent("an alias", frozenset({aten.alias.default, aten.lift_fresh.default}), lambda facts, node: True)

# Stops gradients, so an EXACT rule must not look through it.
DETACH = Transparent("detach", frozenset({aten.detach.default}), lambda facts, node: True)

# Everything that keeps values *and* gradients.
VALUE_PRESERVING = (NOOP_CAST, EVAL_DROPOUT, CONTIGUOUS, NOOP_SHAPE, ALIAS)
