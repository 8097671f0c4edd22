# SPDX-License-Identifier: Apache-2.0
"""The rewriter's operators as ONNX model-local functions.

Domain ``ai.rewriter`` version 1: one function per operator, plus the decoders they share, in ONNX's own text syntax
over standard operators. Codes stay packed bytes in the file; every bit operation works on uint8, the width that ONNX
Runtime's CPU kernels of ``BitShift`` and ``BitwiseAnd`` have in common. A runtime that knows nothing of the domain
inlines the functions when it loads the model and folds what depends on weights alone.

Standard operators take no missing factor or term, so each combination of optional inputs has a body of its own under
the operator's name, a function *overload* (ONNX IR 10): a call with shift and bias is one of ``BcqLinear:shift_bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx
import onnx.parser
import onnx_ir as ir

from rewriter.codegen import onnx_after_head, onnx_linear_attention, onnx_shift_add, onnx_tversky, onnx_vq_logits
from rewriter.codegen.onnx_operator import DOMAIN, SHARED, VERSION

FAMILIES = (onnx_after_head, onnx_linear_attention, onnx_shift_add, onnx_tversky, onnx_vq_logits)
OPERATORS = {name: operator for family in FAMILIES for name, operator in family.OPERATORS.items()}
# A helper calls only those above it.
_HELPERS = SHARED | {name: text for family in FAMILIES for name, text in family.HELPERS.items()}

# Edits that put ONNX Runtime's own operators in place of some calls; each returns how many it replaced.
CONTRIB: tuple[Callable[[ir.Model], int], ...] = tuple(
    edit for family in FAMILIES for edit in getattr(family, "CONTRIB", ())
)


def overload_of(name: str, present: Sequence[bool]) -> str:
    """The overload of operator ``name`` for a call whose inputs are present as listed: ``"shift_bias"``, ``""``, ..."""
    optional = OPERATORS[name].optional
    return "_".join(word for i, word in optional.items() if i < len(present) and present[i])


def function_protos(called: Iterable[tuple[str, str]], opset: int) -> list[onnx.FunctionProto]:
    """The functions that calls of ``called`` (operator, overload) need, bodies stamped with ``opset``.

    The bodies use no operator whose meaning changed between opsets 20 and 25, so one text serves all of them.

    Raises:
        KeyError: the domain has no such operator.
    """
    calls = sorted(set(called))
    operators = [_parse(_text(name, overload), opset, overload) for name, overload in calls]
    used = {node.op_type for function in operators for node in function.node if node.domain == DOMAIN}
    helpers: list[onnx.FunctionProto] = []
    for name in reversed(_HELPERS):  # a helper calls only those above it
        if name in used:
            helper = _parse(_HELPERS[name], opset)
            used |= {node.op_type for node in helper.node if node.domain == DOMAIN}
            helpers.append(helper)
    return [*reversed(helpers), *operators]


def _text(name: str, overload: str) -> str:
    operator = OPERATORS[name]
    given = set(overload.split("_"))
    return operator.text(*(word in given for word in operator.optional.values()))


def _parse(text: str, opset: int, overload: str = "") -> onnx.FunctionProto:
    header = f'<domain: "{DOMAIN}", opset_import: ["": {opset}, "{DOMAIN}": {VERSION}]>\n'
    function = onnx.parser.parse_function(header + text)
    function.overload = overload
    return function
