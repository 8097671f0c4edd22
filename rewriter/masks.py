# SPDX-License-Identifier: Apache-2.0
"""What an attention mask lets through: full, causal, a causal window, padding; found by evaluating it.

    full          every query sees every key
    causal        query i sees the keys j ≤ i
    window(w)     query i sees the keys i - w < j ≤ i
    padding       key j is seen where the padding input [batch, keys] is not zero; also together with the above

Masks are spelled in too many ways for patterns (current transformers index a padding mask with four broadcast aranges,
look for packed sequences in position ids, and compare in boolean algebra), but each of them is a small function of
positions. So the mask's part of the graph is run (`rewriter.positions`) at every size up to 2·window + 3, with several
paddings at once, and compared with the definitions above. Where anything disagrees, or the mask reads anything but
positions and one padding input, its kind is "unknown", with the reason, and only rewrites that hand on the mask's value
apply.

A window too large to be evaluated at 2·w + 3 is read off two copies of the mask in which its number is a small one.
That is the one place where the answer is not seen at the size itself; the copies must agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.facts import Facts
from rewriter.positions import Positions, bound, symbols_of
from rewriter.schemas import base_name, describe

_SMALL = 16  # numbers up to this are lengths the evaluated sizes go beyond
_SIZES = 7  # sizes evaluated at least, 1 to this
_LARGEST = 4096  # constants up to this dimension are evaluated as a whole
_SHIFTED = (5, 8)  # what a large number is replaced by, in two copies
_MASKED = -1e4  # an additive mask hides a key with this or less


@dataclass(frozen=True)
class MaskKind:
    """What a mask lets through.

    Attributes:
        kind: ``full``, ``causal``, ``window``, ``padding``, ``causal+padding``, ``window+padding`` or ``unknown``.
        window: number of keys a row of a causal window sees at most (its own among them), else None.
        padding: the input [batch, keys], 0 where a key is hidden, else None.
        reason: why the kind is unknown, else empty.
    """

    kind: str
    window: int | None = None
    padding: Node | None = None
    reason: str = ""

    @property
    def every_row_sees_a_key(self) -> bool:
        """Whether no row of the scores can be hidden as a whole."""
        return self.kind in ("full", "causal", "window")

    def __str__(self) -> str:
        name = self.kind.replace("window", f"window({self.window})")
        return f"{name}: {self.reason}" if self.reason else name


def unknown(reason: str) -> MaskKind:
    return MaskKind("unknown", reason=reason)


def classify(facts: Facts, mask: Node, form: str | None = None, at: Node | None = None) -> MaskKind:
    """The kind of an attention mask.

    Args:
        facts: of the graph.
        mask: [..., queries, keys], or broadcasting to it.
        form: ``"added"`` to the scores (0 = seen, at most -1e4 = hidden), ``"keep"`` (True = seen) or ``"drop"``
            (True = hidden); by default a floating mask is added and a boolean one keeps.
        at: the node that reads the mask, for masks that are written in place after they were made.

    Returns:
        The kind; never raises. Costs about 1 ms for each size evaluated.
    """
    shape, dtype = facts.shape(mask), facts.dtype(mask)
    if shape is None or dtype is None or not shape:
        return unknown("the mask has no dimensions")
    form = form or ("keep" if dtype == torch.bool else "added")
    if (form == "added") is not dtype.is_floating_point or (form != "added") is not (dtype == torch.bool):
        return unknown(f"a mask of {dtype} cannot be one that is {form!r}")
    part = Positions.of(facts, mask, at)
    if isinstance(part, str):
        return unknown(part)
    if (reason := _foreign_inputs(part)) is not None:
        return unknown(reason)
    if part.extent > _LARGEST:
        return unknown(f"reads a constant with a dimension of {part.extent}, too large to be evaluated")
    return _Trial(part, form).kind()


def _foreign_inputs(part: Positions) -> str | None:
    """Why the inputs the mask reads are not a padding mask alone."""
    if len(part.inputs) > 1:
        return f"reads {' and '.join(describe(n) for n in part.inputs)}"
    for node in part.inputs:
        shape = part.facts.shape(node) or ()
        if len(shape) != 2:
            return f"reads {describe(node)} with {len(shape)} dimensions, which is no padding mask [batch, keys]"
        if any(base_name(user.target) == "embedding" for user in _readers(part.facts, node)):
            return f"reads {describe(node)}, which is looked up in an embedding: these are tokens or positions"
    return None


def _readers(facts: Facts, node: Node) -> Iterator[Node]:
    """Users of a value, also in another shape."""
    for user in facts.users(node):
        yield user
        if base_name(user.target) in ("view", "reshape", "to", "unsqueeze", "squeeze", "expand"):
            yield from _readers(facts, user)


# Everything the definitions need of one evaluation: [paddings, heads, queries, keys], and the paddings [paddings, keys].
_Seen = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Trial:
    """The evaluations of one mask."""

    part: Positions
    form: str

    def kind(self) -> MaskKind:
        large = [number for number in self.part.numbers if abs(number) > _SMALL]
        seen = self._judge({})
        if not large or seen.kind == "unknown":
            return seen
        top = max(large, key=abs)
        if any(abs(abs(top) - abs(number)) > 2 for number in large):
            return unknown(f"compares positions with {', '.join(map(str, large))}, too large to be evaluated")
        return self._with_large(seen, large, abs(top))

    def _with_large(self, seen: MaskKind, large: list[int], top: int) -> MaskKind:
        """The kind where positions are compared with numbers beyond every evaluated size."""
        copies = []
        for small in _SHIFTED:
            by = top - small
            copies.append((self._judge({n: n - by if n > 0 else n + by for n in large}), by))
        if all(copy == seen for copy, _ in copies):
            return seen  # the number changes nothing
        windows = {copy.window + by for copy, by in copies if copy.window is not None}
        same = {copy.kind.replace("window", "causal") for copy, _ in copies} == {seen.kind}
        if len(windows) == 1 and all(copy.window is not None for copy, _ in copies) and same:
            return MaskKind(seen.kind.replace("causal", "window"), windows.pop(), seen.padding)
        return unknown(f"depends on the number {top}, which is too large to be evaluated, but not as a window")

    def _judge(self, moved: Mapping[int, int]) -> MaskKind:
        """The kind that the evaluations agree on, with some numbers replaced."""
        upper = max([_SIZES, *(2 * abs(moved.get(n, n)) + 3 for n in self.part.numbers if n in moved or abs(n) <= _SMALL)])
        found: dict[tuple[int, int], _Seen] = {}
        for count in (*range(1, upper + 1), *([self.part.extent] if self.part.extent > upper else [])):
            for sizes in self._bindings(count):
                result = self._evaluate(sizes, moved)
                if isinstance(result, str):
                    return unknown(result)
                found.setdefault((result[0].shape[-2], result[0].shape[-1]), result)
            if not self.part.symbols:
                break
        return _agreed(found, self.part.inputs[0] if self.part.inputs else None)

    def _bindings(self, count: int) -> Iterator[dict[sympy.Symbol, int]]:
        """Numbers for the symbolic sizes where there are `count` keys; where queries are counted apart, several."""
        facts, batch = self.part.facts, len(_paddings(count))
        shape = facts.shape(self.part.region.exit) or ()
        keys = symbols_of(shape[-1])
        for node in self.part.inputs:  # the padding input has as many columns as there are keys
            keys |= symbols_of((facts.shape(node) or ())[-1])
        queries = (symbols_of(shape[-2]) if len(shape) > 1 else frozenset()) - keys
        rest = self.part.symbols - keys - queries
        for rows in (count,) if not queries else sorted({1, 2, count, count + 1}):
            yield dict.fromkeys(keys, count) | dict.fromkeys(queries, rows) | dict.fromkeys(rest, batch)

    def _evaluate(self, sizes: Mapping[sympy.Symbol, int], moved: Mapping[int, int]) -> _Seen | str:
        """What is seen under all paddings, or why that cannot be said."""
        if not self.part.inputs:
            visible = self._visible(sizes, {}, moved)
            return visible if isinstance(visible, str) else (_as_heads(visible, 1), torch.ones(1, visible.shape[-1]))
        (node,) = self.part.inputs
        rows, keys = (bound(size, sizes) for size in self.part.facts.shape(node) or ())
        paddings = _paddings(keys)
        parts = []
        for start in range(0, len(paddings), rows):  # a fixed batch size takes several runs
            chunk = paddings[start : start + rows]
            filled = torch.cat([chunk, torch.ones(rows - len(chunk), keys, dtype=torch.long)])
            visible = self._visible(sizes, {node: filled.to(self.part.facts.dtype(node))}, moved)
            if isinstance(visible, str):
                return visible
            if visible.dim() < 2 or visible.numel() // (visible.shape[-1] * visible.shape[-2]) % rows:
                return f"mixes the rows of {describe(node)}"
            parts.append(_as_heads(visible, rows)[: len(chunk)])
        return torch.cat(parts), paddings

    def _visible(
        self, sizes: Mapping[sympy.Symbol, int], inputs: Mapping[Node, Tensor], moved: Mapping[int, int]
    ) -> Tensor | str:
        try:
            value = self.part.evaluate(sizes, inputs, moved)
        except Exception as error:  # operators raise what they like; the graph then does not run at this size either
            at = ", ".join(f"{symbol} = {size}" for symbol, size in sorted(sizes.items(), key=str))
            return f"cannot be evaluated at {at or 'its size'}: {str(error).strip().splitlines()[0]}"
        if self.form != "added":
            return value if self.form == "keep" else ~value
        if not bool(((value == 0) | (value <= _MASKED)).all()):
            other = value[(value != 0) & ~(value <= _MASKED)].flatten()[0].item()
            return f"adds {other:g} to scores: it is a bias, too"
        return value == 0


def _paddings(keys: int) -> Tensor:
    """Paddings that tell the kinds apart, [paddings, keys]: none, left, right, holes, one key, all."""
    at = torch.arange(keys)
    rows = [at >= 0, at >= (keys + 1) // 2, at <= keys // 2, at % 2 == 0, at % 3 == 1, at == keys - 1, at < 0]
    return torch.stack(rows).long()


def _as_heads(visible: Tensor, batch: int) -> Tensor:
    """[batch, heads, queries, keys] of [..., queries, keys] with batch · heads leading entries."""
    matrix = visible if visible.dim() > 1 else visible[None]
    return matrix.reshape(batch, -1, *matrix.shape[-2:])


def _agreed(found: Mapping[tuple[int, int], _Seen], padding: Node | None) -> MaskKind:
    """The kind that holds at all evaluated sizes."""
    shapes = {size: visible[0, 0] for size, (visible, _) in found.items()}
    for visible, _ in found.values():
        if bool((visible[0] != visible[0, :1]).any()):
            return unknown("differs between heads")
    padded = any(bool((visible != visible[:1]).any()) for visible, _ in found.values())
    for (_, keys), (visible, paddings) in found.items():
        expected = visible[:1, :1] & (paddings.bool() if padded else torch.ones(1, keys).bool())[:, None, None]
        if bool((visible != expected).any()):
            name = describe(padding) if padding is not None else "an input"
            return unknown(f"reads {name} in another way than as a padding mask")
    base = _structure(shapes)
    if isinstance(base, str):
        return unknown(base)
    name, window = base
    if padded:
        name = "padding" if name == "full" else f"{name}+padding"
    return MaskKind(name, window, padding if padded else None)


def _structure(shapes: Mapping[tuple[int, int], Tensor]) -> tuple[str, int | None] | str:
    """full, causal or window(w), whichever holds at all sizes [queries, keys] -> matrix; or what speaks against it."""
    if all(bool(matrix.all()) for matrix in shapes.values()):
        return "full", None
    if any(queries != keys for queries, keys in shapes):
        return "hides keys where queries and keys are counted apart"
    largest = shapes[max(shapes)]
    window = int(largest[-1].sum())
    candidates: list[tuple[str, int | None, Callable[[Tensor], Tensor]]] = [
        ("causal", None, lambda ahead: ahead <= 0),
        ("window", window, lambda ahead: (ahead <= 0) & (ahead > -window)),
    ]
    for name, size, rule in candidates:
        if all(bool((matrix == rule(_ahead(len(matrix)))).all()) for matrix in shapes.values()):
            return name, size
    where = next(at for at, matrix in shapes.items() if not bool((matrix == (_ahead(len(matrix)) <= 0)).all()))
    if bool((largest & (_ahead(len(largest)) > 0)).any()):
        return f"lets queries see some later keys (at {where[0]} positions)"
    return f"is neither causal nor a window at {where[0]} positions"


def _ahead(count: int) -> Tensor:
    """How far key j lies ahead of query i: j - i, [count, count]."""
    at = torch.arange(count)
    return at[None] - at[:, None]
