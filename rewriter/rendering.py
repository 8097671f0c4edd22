# SPDX-License-Identifier: Apache-2.0
"""What people see: plans, reports, misses, differences and verdicts, readable at 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewriter.layout import KEEP, Flowing, add, change, counted, heading, human_bytes, spans, table, times

if TYPE_CHECKING:
    from rewriter.applying import SiteResult
    from rewriter.diffing import Diff, NodeLine, SiteDiff
    from rewriter.figures import Figure
    from rewriter.matcher import Miss
    from rewriter.planner import Plan
    from rewriter.reports import Measurement, Report, SiteCode
    from rewriter.verification import Verification

_TWIN = "_dense"  # the same figure of what the site was, named so in the JSON
_WORDS = {"kl": "KL", "pj": "energy of"}
_CONTRACT_STYLE = {"EXACT": "green", "BOUNDED": "cyan", "CALIBRATED": "yellow", "LEARNED": "red"}
# What a choice records about the site itself; the rest of it was chosen.
_GIVEN = frozenset({"in_features", "has_bias", "transposed"})
_SHOWN_SITES = 3  # per line of what was skipped
_SHOWN_FIGURES = 12  # of a verdict


def contract(text: str) -> Text:
    return Text(text, style=_CONTRACT_STYLE.get(text.partition("(")[0], ""))


# ------------------------------------------------------------------------------------------------------------ plan


def plan_table(plan: Plan) -> RenderableType:
    """Sites by rule and settings; layers that repeat are one line."""
    parts: list[RenderableType] = [heading(counted(len(plan.sites), "planned site"))]
    by_rule: dict[tuple[str, str], list[str]] = {}
    for site in plan.sites:
        decided = settings({**site.settings, **_chosen(site.choice)})
        by_rule.setdefault((site.rule, decided), []).append(site.address.path or "<root>")
    for (rule, decided), paths in by_rule.items():
        parts += [
            Text(),
            heading(rule, counted(len(paths), "site")),
            Flowing("  " + decided, after=" ", indent=2, style="dim"),
        ]
        rows = Table.grid(padding=(0, 2))
        for span, count in spans(paths):
            add(rows, Text(), Flowing(span), times(count))
        parts.append(rows)
    return Group(*parts, Text(), misses(plan.misses))


# ---------------------------------------------------------------------------------------------------------- report


def report(report: Report) -> RenderableType:
    """Sites, what was skipped and why, sizes, measurements."""
    parts: list[RenderableType] = [heading(f"{report.model}: {counted(len(report.sites), 'rewritten site')}"), Text()]
    parts += _sites(report.sites)
    parts += [misses(report.misses), _sizes(report)]
    if report.code:
        parts += [heading(f"runs on {report.device}"), *_code(report.code)]
    if report.measurements:
        parts.append(_measurements(report.measurements))
    if not report.calibrated and any(s.contract.startswith("CALIBRATED") for s in report.sites):
        parts.append(Text("uncalibrated: no calibration data were given, counts are taken as uniform", style="yellow"))
    if any(s.contract == "LEARNED" for s in report.sites):
        parts.append(Text("untrained: LEARNED sites start from the weights and need training", style="yellow"))
    parts += [Flowing(f"note: {note}", after=" ", style="dim") for note in report.notes]
    return Group(*parts)


def _sites(sites: Sequence[SiteResult]) -> Iterator[RenderableType]:
    """One table per rule, with its figures as columns; all are aligned."""
    widest = max((len(_path(s)) for s in sites), default=0)
    by_rule: dict[tuple[str, str], list[SiteResult]] = {}
    for site in sites:
        by_rule.setdefault((site.rule, site.contract), []).append(site)
    for (rule, promise), members in by_rule.items():
        choices = list(dict.fromkeys(settings(_chosen(s.choice)) for s in members))
        title = Text.assemble((rule, "bold"), " · ", contract(promise), f" · {counted(len(members), 'site')}")
        yield title.append(f" · {choices[0]}", style="dim") if len(choices) == 1 and choices[0] else title
        yield _rule_table(members, min(widest, 48), choices if len(choices) > 1 else [])
        if (totals := _totals(members)) is not None:
            yield totals


def _rule_table(members: Sequence[SiteResult], width: int, choices: Sequence[str]) -> Table:
    names = dict.fromkeys(name for s in members for name in s.figures)
    figures = [name for name in names if not name.endswith(_TWIN) and name + _TWIN not in names]
    sized = any(s.created for s in members)
    numbers = [*(["before", "after"] if sized else []), *map(_title, figures)]
    rows = table("site", *numbers, *(["choice"] if choices else []), right=numbers, widths=[width])
    for site in members:
        sizes = (
            [human_bytes(b) if site.created else "–" for b in (site.bytes_before, site.bytes_after)] if sized else []
        )
        shown = [_figure(name, site.figures[name]) if name in site.figures else "–" for name in figures]
        add(rows, Flowing(_path(site)), *sizes, *shown, *([settings(_chosen(site.choice))] if choices else []))
    return rows


def _path(site: SiteResult) -> str:
    return (site.created[0].rpartition(".")[0] if site.created else site.paths[0]) or "<root>"


def _title(figure: str) -> str:
    return " ".join(_WORDS.get(word, word) for word in figure.split("_"))


def _figure(name: str, value: float) -> str:
    """Errors are fractions and read as percent; everything else has the unit its name says."""
    return f"{100 * value:.1f} %" if name.endswith("error") else f"{value:.4g}"


def _totals(members: Sequence[SiteResult]) -> Text | None:
    """Figures that stand beside their twin of the original, summed over the sites, as multiples of it."""
    names = dict.fromkeys(name for s in members for name in s.figures if name + _TWIN in s.figures)
    parts = []
    for name in names:
        after, before = (sum(s.figures.get(n, 0.0) for s in members) for n in (name, name + _TWIN))
        parts.append(f"{_title(name)} ×{after / before:.2f}" if before else f"{_title(name)} {after:.4g}")
    return Text(f" {', '.join(parts)}, of the original", style="dim") if parts else None


def _sizes(report: Report) -> Table:
    rows = table("bytes as stored", "before", "after", "change", right=("before", "after", "change"))
    for rule in dict.fromkeys(s.rule for s in report.sites if s.created):
        before, after = report.group_bytes(rule)
        add(rows, f"sites of {rule}", human_bytes(before), human_bytes(after), change(before, after))
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else float("inf")
    whole = (human_bytes(report.bytes_before), human_bytes(report.bytes_after), f"{ratio:.2f} × smaller")
    rows.add_row(*(Text(c, style="bold") for c in ("whole model", *whole)))
    return rows


def _measurements(found: Mapping[str, Measurement]) -> Table:
    rows = table("measured", "before", "after", "", right=("before", "after"))
    for name, one in found.items():
        add(rows, name, _quantity(one.before, one.unit), _quantity(one.after, one.unit), Text(one.note, style="dim"))
    return rows


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return human_bytes(int(value))
    if unit == "share":
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" + (f" {unit}" if unit else "")


def _chosen(choice: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in choice.items() if k not in _GIVEN}


def settings(values: Mapping[str, Any]) -> str:
    """``bits=4 group=128``: scalars only, the rest is in the JSON."""
    return " ".join(
        f"{k}={_short(v)}" for k, v in values.items() if v is not None and not isinstance(v, list | tuple | dict)
    )


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ code

_CODE_STYLE = {"reference": "yellow"}
_WHY = {"reference": "runs its reference", "emitted": "fuses no more"}


def _code(found: Sequence[SiteCode]) -> Iterator[RenderableType]:
    """What runs where, sites that run the same in one row; then why some run their reference, or unfused."""
    rows = table("sites", "runs")
    alike: dict[tuple[str, ...], list[SiteCode]] = {}
    for one in found:
        alike.setdefault((one.operator, one.code, one.source, *one.fused), []).append(one)
    for members in alike.values():
        first = members[0]
        add(rows, Group(*code_sites(members), *code_of(first)), code_kind(first))
    yield rows
    yield from code_reasons(one for one in found if not (one.fused and one.code == "emitted"))


def code_sites(members: Sequence[SiteCode]) -> Iterator[RenderableType]:
    for path, count in spans(one.site or "<root>" for one in members):
        yield Flowing(f"{path} {times(count)}".strip(), after=".{ ")


def code_of(one: SiteCode) -> Iterator[RenderableType]:
    """``bcq_linear + gelu + add``, without overloads, and the file below it."""
    names = [one.operator, *(name.partition(".")[0] for name in one.fused)]
    yield Flowing("  " + " + ".join(names), after=" _", indent=4)
    yield Flowing(f"  {one.source}", after="/_ ", indent=4, style="dim")


def code_kind(one: SiteCode) -> RenderableType:
    return Text(one.code, _CODE_STYLE.get(one.code, "green"))


def code_reasons(found: Iterable[SiteCode]) -> Iterator[RenderableType]:
    """Why sites run their reference, and why nothing, or no more, is fused into others."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        if one.why:
            what = _WHY.get(one.code, "runs unfused")
            why = re.sub(r"\.\d+(?=\.|:| |$)", ".*", one.why)  # of equal layers
            grouped.setdefault((one.operator, what, why), []).append(one.site or "<root>")
    for (operator, what, why), sites in grouped.items():
        where = ", ".join(f"{path} {times(count)}".strip() for path, count in spans(sites))
        style = "yellow" if what == _WHY["reference"] else "dim"
        yield Flowing(f"{operator} {what}: {why} ({where})", after=" .{", style=style)


# ---------------------------------------------------------------------------------------------------------- misses


def misses(found: Iterable[Miss]) -> RenderableType:
    """Grouped by rule and reason: twelve layers refused for one reason are one line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for miss in found:
        grouped.setdefault((miss.rule, miss.reason), []).append(miss.site or "<root>")
    if not grouped:
        return Text("nothing was skipped", style="dim")
    rows = table("rule", "sites", "why it was left alone")
    for (rule, reason), members in grouped.items():
        sites = [f"{span} {times(count)}".strip() for span, count in spans(dict.fromkeys(members))]
        hidden = len(sites) - _SHOWN_SITES
        lines: list[RenderableType] = [Flowing(s, after=".{ ") for s in sites[:_SHOWN_SITES]]
        add(rows, Flowing(rule), Group(*lines, *([Text(f"and {hidden} more")] if hidden > 0 else [])), reason)
    return Group(heading("skipped"), rows)


# ------------------------------------------------------------------------------------------------------ difference


def diff_table(diff: Diff) -> RenderableType:
    """Before on the left in red, after on the right in green; places that repeat in other layers are shown once."""
    counts = f"{counted(len(diff.sites), 'place')} changed", f"{counted(diff.unchanged, 'node')} unchanged"
    parts: list[RenderableType] = [heading(*counts)]
    alike: dict[Any, list[SiteDiff]] = {}
    for site in diff.sites:
        alike.setdefault(_shape(site), []).append(site)
    for members in alike.values():
        span, count = spans([m.path for m in members])[0]
        first = members[0]
        also = f"{count} alike, {first.path} is shown" if count > 1 else ""
        parts += [Text(), heading(span or "<root>", also), _sides(first)]
    return Group(*parts)


def _sides(site: SiteDiff) -> Table:
    sides = Table.grid(padding=(0, 2), expand=True)
    sides.add_column(ratio=1)
    sides.add_column(ratio=1)
    before = [_node(n, site.path, "- ", "red") for n in site.removed]
    after: list[RenderableType] = []
    for (rule, origin), nodes in groupby(site.added, key=lambda n: (n.rule, n.origin)):
        after += [_node(n, site.path, "+ ", "green") for n in nodes]
        names = [o.partition(":")[0] for o in origin]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        after.append(Flowing(f"    {rule}, from {shown}" if names else f"    {rule}", after=" ", indent=4, style="dim"))
    sides.add_row(Group(*before) if before else Text("(nothing)", style="dim"), Group(*after))
    return sides


def _node(node: NodeLine, site: str, mark: str, style: str) -> Flowing:
    return Flowing(mark + node_text(node, site), after=" (", indent=4, style=style)


def node_text(node: NodeLine, site: str) -> str:
    """``linear_4 = aten.linear(mul_13, gate_proj.weight) → f32[s0, s1, 640]``, names relative to ``site``."""
    kept = re.sub(r"\[[^\]]*\]", lambda shape: shape[0].replace(" ", KEEP), node.result)
    result = f" →{KEEP}{kept}" if kept else ""
    if node.is_tensor:
        return relative(node.op, site) + result
    if node.op == "operator.getitem":
        return f"{node.name} = {node.operands[0]}[{node.operands[1]}]{result}"
    return f"{node.name} = {node.short_op}({', '.join(relative(o, site) for o in node.operands)}){result}"


def relative(name: str, site: str) -> str:
    """A tensor's name seen from a module: without the module's path, or without its parent's."""
    for above in (site, site.rpartition(".")[0]):
        if above and name.startswith(above + "."):
            return name.removeprefix(above + ".")
    return name


def _shape(site: SiteDiff) -> Any:
    """Equal for places that differ in layer numbers and node names only."""
    template = tuple("#" if p.isdigit() else p for p in site.path.split("."))
    return template, tuple(
        tuple((n.result, n.rule, "" if n.is_tensor else n.op) for n in side) for side in (site.removed, site.added)
    )


# --------------------------------------------------------------------------------------------------------- verdict


def verification(verdict: Verification) -> RenderableType:
    """Every output, and of the gradients those that moved or lost accuracy, else the worst."""
    word = (
        Text("golden run passed", style="bold green") if verdict.passed else Text("golden run FAILED", style="bold red")
    )
    dtypes = ", ".join(d.removeprefix("torch.") for d in verdict.dtype) or "no floating dtype"
    word.append(f" · {counted(verdict.samples, 'input')} · {dtypes}", style="not bold default")
    notable = [g for g in verdict.gradients if not g.passed or g.note]
    rest = [g for g in verdict.gradients if g.passed and not g.note]
    worst = sorted(rest, key=lambda g: -g.relative)[: 0 if notable else 3]
    shown = [*verdict.outputs, *notable, *worst][:_SHOWN_FIGURES]
    numbers = ("relative", "error before", "error after", "allowed")
    rows = table("", "value", *numbers, right=numbers)
    for figure in shown:
        _figure_row(rows, figure)
    hidden = len(verdict.outputs) + len(verdict.gradients) - len(shown)
    parts: list[RenderableType] = [word, rows]
    if hidden:
        parts.append(Text(f"{hidden} more values; --json lists them all", style="dim"))
    if verdict.reason:
        parts.append(Flowing(verdict.reason, after=" ", style="red"))
    return Group(*parts)


def _figure_row(rows: Table, figure: Figure) -> None:
    errors = (figure.error_before, figure.error_after, figure.allowed)
    mark, style = ("✓", "") if figure.passed else ("✗", "red")
    mark, style = ("!", "yellow") if figure.passed and figure.note else (mark, style)
    cells = (f"{figure.relative:.1e}", *("" if e is None else f"{e:.1e}" for e in errors))
    rows.add_row(Text(mark, style), Flowing(figure.name, after=". ", style=style), *(Text(c, style) for c in cells))
