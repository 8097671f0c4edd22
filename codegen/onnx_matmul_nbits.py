# SPDX-License-Identifier: Apache-2.0
"""Binary codes that are a uniform grid become ``com.microsoft::MatMulNBits``, which keeps them packed in memory.

Bases whose exponents are 0, 1, …, b-1 are the mid-rise grid: with q = Σ_j bit_j 2^(b-1-j), base 0 on top,

    w = step · (q - 2^(b-1) + 1/2),   step = scale · 2^(2-b).

ONNX Runtime's fast kernels take the zero point 2^(b-1), without the half; a floating zero point it decodes at every
call (80 times slower for one token). So the half goes beside the product, one number per block of inputs and row:

    y = MatMulNBits(x; q, step) + (x S) (step/2)ᵀ (+ bias),   S[i, k] = 1 where input i lies in block k.

Bits 2 and 4 (what the kernels run on every processor), blocks of 16, 32, 64, 128 or 256; a group of another width that
one of these divides repeats its scale. Other sites keep their functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from rewriter.codegen.onnx_operator import CONTRIB_DOMAIN, DOMAIN
from rewriter.kernels.shift_add.codec import ceil_div, unpack_bits, unpack_nibbles

_BITS = (2, 4)
_BLOCKS = (256, 128, 64, 32, 16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def replace(model: ir.Model) -> int:
    """Replace every ``BcqLinear`` whose grid is uniform; returns how many. Works in place."""
    count = 0
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "BcqLinear" and (site := _Site.of(node)) is not None:
            site.rewrite(model)
            count += 1
    if count:
        model.opset_imports[CONTRIB_DOMAIN] = 1
    return count


@dataclass(frozen=True, eq=False)
class _Site:
    """One uniform layer: y = x wᵀ + bias with w = step · (q - 2^(bits-1) + 1/2).

    ``q`` is uint8 [N, K], ``step`` float64 [N, blocks].
    """

    node: ir.Node
    x: ir.Value
    name: str
    q: np.ndarray
    step: np.ndarray
    bits: int
    block: int
    dtype: ir.DataType

    @classmethod
    def of(cls, node: ir.Node) -> _Site | None:
        """The site, or None where its grid, its shape or its dtype has no such node."""
        x, codes, scale, shift = (*node.inputs, None)[:4]  # bases with scales of their own have no shift
        if x is None or codes is None or scale is None or shift is None or x.dtype not in _FLOATS:
            return None
        stored = [value.const_value for value in (codes, scale, shift)]
        if any(tensor is None for tensor in stored):
            return None
        packed, scales, exponents = (torch.from_numpy(np.array(tensor.numpy())) for tensor in stored if tensor)
        bits, group, width = packed.shape[1], _attribute(node, "group"), _attribute(node, "in_features")
        block = _block(group, width)
        if bits not in _BITS or block is None or not _uniform(scales, exponents, bits):
            return None
        blocks = ceil_div(width, block)
        repeats = group // block if group < width else blocks
        step = np.repeat((scales.double() * 2.0 ** (2 - bits)).numpy(), repeats, axis=1)[:, :blocks]
        if x.dtype == ir.DataType.FLOAT16 and not np.array_equal((step / 2).astype(np.float16), step / 2):
            return None
        place = 2 ** torch.arange(bits - 1, -1, -1).view(1, -1, 1)
        q = (unpack_bits(packed, width).long() * place).sum(1).to(torch.uint8).numpy()
        return cls(node, x, str(codes.name).removesuffix("_codes"), q, step, bits, block, x.dtype)

    def rewrite(self, model: ir.Model) -> None:
        """Put the nodes in place of the call, and drop the tensors that nobody reads any more."""
        node, (rows, width), kind = self.node, self.q.shape, self.dtype.numpy()
        member = np.arange(width)[:, None] // self.block == np.arange(self.step.shape[1])
        packed = _initial(model, f"{self.name}_nbits", _packed(self.q, self.bits, self.block))
        steps = _initial(model, f"{self.name}_steps", self.step.reshape(-1).astype(kind))
        halves = _initial(model, f"{self.name}_halves", (self.step.T / 2).astype(kind))
        blocks = _initial(model, f"{self.dtype.name}_blocks_of_{self.block}_in_{width}", member.astype(kind))
        product = ir.node(
            "MatMulNBits",
            [self.x, packed, steps],
            {"K": width, "N": rows, "bits": self.bits, "block_size": self.block},
            domain=CONTRIB_DOMAIN,
            version=1,
        )
        sums = ir.node("MatMul", [self.x, blocks])
        half = ir.node("MatMul", [sums.outputs[0], halves])
        total = ir.node("Add", [product.outputs[0], half.outputs[0]])
        made = [product, sums, half, total]
        bias = node.inputs[4] if len(node.inputs) > 4 else None
        if bias is not None and bias.dtype != self.dtype:
            made.append(ir.node("Cast", [bias], {"to": int(self.dtype)}))
            bias = made[-1].outputs[0]
        if bias is not None:
            made.append(ir.node("Add", [total.outputs[0], bias]))
        old, new = node.outputs[0], made[-1].outputs[0]
        for each in made:
            each.metadata_props.update(node.metadata_props)
            each.outputs[0].dtype = self.dtype
        new.shape = old.shape
        model.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = old.name
        read = [value for value in node.inputs if value is not None]
        model.graph.remove(node, safe=True)
        for value in read:
            name = value.name or ""
            if name in model.graph.initializers and not value.uses():
                del model.graph.initializers[name]


def _uniform(scales: torch.Tensor, exponents: torch.Tensor, bits: int) -> bool:
    """Whether the exponents of every group are 0, 1, …; those of a zero group do not matter."""
    k = unpack_nibbles(exponents, bits)[scales != 0]
    return torch.equal(k, torch.arange(bits, dtype=torch.uint8).expand_as(k))


def _block(group: int, width: int) -> int | None:
    """The widest block that divides a group, or that holds a row which is one group."""
    if group < width:
        return next((b for b in _BLOCKS if group % b == 0), None)
    return next((b for b in reversed(_BLOCKS) if b >= width), _BLOCKS[0])


def _packed(q: np.ndarray, bits: int, block: int) -> np.ndarray:
    """[N, blocks, block · bits / 8], the lowest input in the lowest bits; padding is the zero point."""
    rows, width = q.shape
    blocks = ceil_div(width, block)
    padded = np.full((rows, blocks * block), 1 << (bits - 1), dtype=np.uint8)
    padded[:, :width] = q
    per_byte = 8 // bits
    fields = padded.reshape(rows, blocks, block // per_byte, per_byte)
    places = (np.arange(per_byte) * bits).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(fields << places, axis=-1).astype(np.uint8)
    return packed


def _initial(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initialiser, or the one of that name: layers of one shape share their blocks, a shared layer its weight."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _attribute(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()
