# SPDX-License-Identifier: Apache-2.0
"""Promotion: the same program with every floating value in float64, the yardstick of the golden run.

``.double()`` is not enough. A captured graph holds dtype *literals* (transformers casts to float32 in its
norms and softmaxes), assertions on dtypes, constants lifted out of the model's code, and operators that turn
integers into torch's default dtype. Each of them keeps a float64 program at float32 accuracy, so promotion
rewrites all of them.

What promotion does not touch, on purpose:

- Numbers. A mask filled with ``torch.finfo(float32).min`` keeps that number: it is the model's definition of
  "masked", and it is large enough in float64 too (a score of ordinary size added to -3.4e38 is absorbed, so a
  row that sees no key stays uniform). ``finfo(float64).min`` would be another function: two such masks added
  overflow to -inf, and their rows become NaN.
- Integers and booleans, packed codes among them.
- Bits. A bit cast reads the bits its operand has in the program's own dtype; the operand is rounded to that
  dtype first, and a floating result is promoted afterwards.

Attention is computed by its definition, softmax(scale · q kᵀ + mask) v. The fused kernels' backward
recomputes the softmax from its log-sum-exp, and beside a mask of -3.4e38 the logarithm of the sum is
absorbed: the probabilities of a row that sees no key come out as 1 instead of 1/n there, in float64 too,
while the forward pass is right to the last digit.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        "aten::_assert_tensor_metadata",
        "aten::_assert_scalar",
        "aten::_assert_async",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)
_FLOAT_METHODS = frozenset({"float", "half", "bfloat16"})
_KEPT = "rewriter.promoted"  # meta mark of a node whose dtype literal is already as promotion wants it

Convert = Callable[[Tensor], Tensor]
Edit = Callable[[Graph], None]


def promote(graph_module: GraphModule) -> GraphModule:
    """A float64 copy of a captured program; complex values become complex128.

    The original is untouched, and the copy shares no tensor with it; tensors that were one object (tied
    weights) are one object in the copy. Bodies of control flow are promoted too, autocast regions disabled,
    assertions dropped. Promoting twice is promoting once. Implicit default dtypes are recognised by
    ``meta["val"]``, which every node of a captured program carries.
    """
    return _rebuild(graph_module, _widened, _promote_graph, {})


def duplicate(graph_module: GraphModule) -> GraphModule:
    """A copy in the program's own dtypes. It shares no tensor: running it cannot change the original."""
    return _rebuild(graph_module, lambda tensor: tensor.detach().clone(), lambda graph: None, {})


def promoted_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for every floating dtype, complex128 for every complex one, else the dtype itself."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def read_tensors(graph_module: GraphModule) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every parameter, buffer and constant the graph reads, in graph order."""
    for name, value in _attributes(graph_module):
        if isinstance(value, Tensor):
            yield name, value


def _attributes(graph_module: GraphModule) -> Iterator[tuple[str, Any]]:
    names = dict.fromkeys(
        str(node.target) for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")
    )
    for name in names:
        value: Any = graph_module
        for part in name.split("."):
            value = getattr(value, part)
        yield name, value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().to(promoted_dtype(tensor.dtype), copy=True)


def _rebuild(source: GraphModule, convert: Convert, edit: Edit, memo: dict[int, Any]) -> GraphModule:
    """``source``'s graph, edited, over converted copies of everything it refers to."""
    graph = copy.deepcopy(source.graph)
    root = nn.Module()
    root.training = source.training
    for name, value in _attributes(source):
        if id(value) not in memo:
            memo[id(value)] = _converted(value, convert, edit, memo)
        _place(root, name, memo[id(value)])
    edit(graph)
    return GraphModule(root, graph)


def _converted(value: Any, convert: Convert, edit: Edit, memo: dict[int, Any]) -> Any:
    if isinstance(value, GraphModule):
        return _rebuild(value, convert, edit, memo)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(convert(value), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, nn.Module):  # a leaf module of a hand-made graph
        leaf = copy.deepcopy(value)
        for module in leaf.modules():
            for held in (module._parameters, module._buffers):
                held.update({k: _converted(t, convert, edit, memo) for k, t in held.items() if t is not None})
        return leaf
    return copy.deepcopy(value)


def _place(root: nn.Module, name: str, value: Any) -> None:
    """Set ``root.<dotted name>``, making the namespaces on the way."""
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(leaf, value)
    else:
        setattr(root, leaf, value)


def _promote_graph(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if _is_assertion(node) and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _KEPT not in node.meta:
            _promote_node(graph, node)
    for node in graph.nodes:
        if "val" in node.meta and _KEPT not in node.meta:
            node.meta["val"] = _promoted_value(node.meta["val"])
    graph.lint()


def _promote_node(graph: Graph, node: Node) -> None:
    if node.op == "call_method" and node.target in _FLOAT_METHODS:
        node.target = "double"
    elif node.target is torch.ops.higher_order.wrap_with_autocast:
        # (device, dtype, enabled, cache_enabled, body, *operands): a region that is off computes in its
        # operands' dtype
        node.args = (*node.args[:2], False, *node.args[3:])
    elif node.target is aten.view.dtype:
        _promote_bit_cast(graph, node)
    elif node.target is aten.scaled_dot_product_attention.default and "val" in node.meta:
        _define_attention(graph, node)
    elif node.target is aten._grouped_mm.default and _arguments(node)["self"].meta["val"].dim() == 2:
        _define_grouped_product(graph, node)
    elif node.target is aten.rms_norm.default and "val" in node.meta:
        _write_epsilon(node)
    elif _turns_integers_into_floats(node):
        _promote_default_dtype(graph, node)
    else:
        _map_literals(node)


def _write_epsilon(node: Node) -> None:
    """rms_norm without an eps takes that of the dtype it computes in, float32 for 16-bit inputs."""
    named = _arguments(node)
    if named.get("eps") is None:
        dtype = node.meta["val"].dtype
        eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
        node.args, node.kwargs = (named["input"], named["normalized_shape"], named.get("weight"), eps), {}


def _map_literals(node: Node) -> None:
    def literal(value: Any) -> Any:
        return promoted_dtype(value) if isinstance(value, torch.dtype) else value

    node.args = pytree.tree_map(literal, node.args)
    node.kwargs = pytree.tree_map(literal, node.kwargs)


def _is_assertion(node: Node) -> bool:
    if node.op == "call_module":
        return node.target == "_guards_fn"
    if isinstance(node.target, OpOverload):
        return node.target._schema.name in _ASSERTIONS
    return node.op == "call_function" and node.target in (torch._assert, torch._check)


# --- operators whose dtype is not written down --------------------------------------------------------------


def _turns_integers_into_floats(node: Node) -> bool:
    """A floating result without a floating operand: the dtype is a literal or torch's default one."""
    if not isinstance(node.target, OpOverload) or not _is_floating(node.meta.get("val")):
        return False
    return not any(_is_floating(operand.meta.get("val")) for operand in node.all_input_nodes)


def _promote_default_dtype(graph: Graph, node: Node) -> None:
    """zeros(n), arange(n) / 3, where(c, 1.0, 0.1): computed in float64 from the start."""
    names = _argument_names(node)
    if "dtype" in names:
        _map_literals(node)
        position = names.index("dtype")
        if len(node.args) <= position:
            node.kwargs = {**node.kwargs, "dtype": node.kwargs.get("dtype") or torch.float64}
        elif node.args[position] is None:
            node.update_arg(position, torch.float64)
    elif node.target in (aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther):
        condition, *choices = node.args
        with graph.inserting_before(node):
            node.args = (condition, *(_scalar(graph, choice, node) for choice in choices))
        node.target = aten.where.self
        node.meta |= {_KEPT: True, "val": _promoted_value(node.meta["val"])}
    elif node.target.namespace == "aten":  # type: ignore[union-attr]
        with graph.inserting_before(node):  # x / y, x * 0.5, sqrt(x) of integers
            for operand in node.all_input_nodes:
                if isinstance(operand.meta.get("val"), Tensor):
                    node.replace_input_with(operand, _cast(graph, operand, torch.float64))
    else:  # an operator of someone else's that decodes integers: its result is exact in the dtype it chose
        with graph.inserting_after(node):
            _cast_users(graph, node)


def _scalar(graph: Graph, value: Any, like: Node) -> Node:
    """A float64 operand for ``like``: a number becomes a tensor on its device."""
    if isinstance(value, Node):
        return _cast(graph, value, torch.float64)
    options = {"dtype": torch.float64, "device": like.meta["val"].device}
    return graph.call_function(aten.scalar_tensor.default, (value,), options)


def _argument_names(node: Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments that are given, by schema name."""
    return dict(zip(_argument_names(node), node.args, strict=False)) | dict(node.kwargs)


def _define_attention(graph: Graph, node: Node) -> None:
    """The operator's aten definition, with the same arguments, in place of a fused kernel."""
    named = _arguments(node)
    mask = named.get("attn_mask")
    if isinstance(mask, Node) and _has_dtype(mask, torch.bool):
        # The definition only adds its mask: 0 where a key is seen, -inf elsewhere.
        with graph.inserting_before(node):
            seen, unseen = (_scalar(graph, v, node) for v in (0.0, -math.inf))
            node.replace_input_with(mask, graph.call_function(aten.where.self, (mask, seen, unseen)))
    node.target = aten._scaled_dot_product_attention_math.default
    with graph.inserting_after(node):  # -> (output, attention weights)
        output = graph.call_function(operator.getitem, (node, 0))
    output.meta = dict(node.meta)
    del node.meta["val"]
    node.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)


def _define_grouped_product(graph: Graph, node: Node) -> None:
    """yᵢ = aᵢ b[g(i)] with g(i) the first group that ends behind row i; the kernel has no float64."""
    named = _arguments(node)
    rows, weights, ends = (named[name] for name in ("self", "mat2", "offs"))
    call = graph.call_function
    with graph.inserting_before(node):
        positions = call(aten.cumsum.default, (call(aten.ones_like.default, (call(aten.select.int, (rows, 1, 0)),)), 0))
        group = call(aten.bucketize.Tensor, (positions, call(aten.to.dtype, (ends, torch.float64))))
        each = call(aten.index_select.default, (weights, 0, group))
        product = call(aten.bmm.default, (call(aten.unsqueeze.default, (rows, 1)), each))
        result = call(aten.squeeze.dim, (product, 1))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _promote_bit_cast(graph: Graph, node: Node) -> None:
    """view(dtype) of a float reads the bits of its own dtype; a float made of bits is promoted as a number.

    Raises:
        ValueError: the operand's own dtype is not known, so its bits are not either.
    """
    operand = node.args[0]
    if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
        raise ValueError(f"{node.format_node()}: the operand of a bit cast needs meta['val'] to be promoted")
    node.meta[_KEPT] = True
    if _is_floating(operand.meta["val"]):
        with graph.inserting_before(node):
            node.update_arg(0, _cast(graph, operand, operand.meta["val"].dtype))
    if _is_floating(node.meta.get("val")):
        with graph.inserting_after(node):
            _cast_users(graph, node)


def _cast(graph: Graph, operand: Node, dtype: torch.dtype) -> Node:
    cast = graph.call_function(aten.to.dtype, (operand, dtype))
    cast.meta = {k: v for k, v in operand.meta.items() if k != _KEPT}
    cast.meta["val"] = _as_dtype(operand.meta["val"], dtype) if "val" in operand.meta else None
    cast.meta[_KEPT] = True
    return cast


def _cast_users(graph: Graph, node: Node) -> None:
    """Put a cast to float64 between a node and its readers."""
    node.meta[_KEPT] = True
    cast = _cast(graph, node, torch.float64)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


# --- values in metadata -------------------------------------------------------------------------------------


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _has_dtype(node: Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is dtype


def _promoted_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _as_dtype(value, promoted_dtype(value.dtype))
    if isinstance(value, list | tuple):
        return type(value)([_promoted_value(v) for v in value])
    return value


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The (fake) tensor in another dtype, same shape, symbols and strides."""
    if not isinstance(value, Tensor) or value.dtype == dtype:
        return value
    with torch.no_grad():
        return value.to(dtype)
