# SPDX-License-Identifier: Apache-2.0
"""Back to the user's own class: rewritten sites as modules, for ``generate``, ``save_pretrained``, peft and trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from rewriter import store
from rewriter.errors import PlanError
from rewriter.optimized import Optimized
from rewriter.planner import PlannedSite, rule_of
from rewriter.rules import Rule
from rewriter.skeleton import named_tensors
from rewriter.undoing import rows_of


@store.outside_inference_mode
def to_module(opt: Optimized) -> nn.Module:
    """The original class with the present parameters; equal to ``opt`` up to rounding.

    Sites with parameters of their own become modules; merged weights are split again; parameter-free exact rewrites
    (a fused attention) go back to the model's own code, which computes the same function. Tensors are shared with
    ``opt`` until either side writes.

    Raises:
        PlanError: there is no model (a loaded file, an ExportedProgram), or a site that has no module form; named.
    """
    if opt._skeleton is None:
        raise PlanError(
            "this model came from a file or an ExportedProgram and has no class to go back to; "
            "use rewriter.load(path, model=…)"
        )
    restored = _Restoration(opt)
    for planned in reversed(opt.plan.sites):
        restored.take_back(planned)
    return restored.module()


class _Restoration:
    """Takes sites back last to first, so that each finds what later sites made of its parameters."""

    def __init__(self, opt: Optimized) -> None:
        assert opt._skeleton is not None  # noqa: S101 - checked by to_module
        self.opt = opt
        self.skeleton = opt._skeleton
        own: dict[int, Tensor] = {}
        self.tensors = {name: own.setdefault(id(t), store.share(t)) for name, t in store.tensors(opt)}
        self.modules: dict[str, nn.Module] = {}
        self.rules: dict[str, Rule] = {}

    def take_back(self, planned: PlannedSite) -> None:
        rule = rule_of(planned)
        if not rule.parametric:
            return
        path = planned.address.path
        roles = {n.removeprefix(path + ".") if path else n: n for n in self.tensors if n.rpartition(".")[0] == path}
        if self._split(rule, planned, path):
            return
        original = self._original_module(path)
        held = {**roles, **rule.borrows(planned.choice)}
        module = rule.module({role: self.tensors[name] for role, name in held.items()}, original, planned.choice)
        if module is None:
            raise PlanError(f"{rule.name} at {path!r} has no module form; opt.undo({path!r}) first, or keep using opt")
        self.modules[path] = module
        self.rules[path] = rule

    def _split(self, rule: Rule, planned: PlannedSite, path: str) -> bool:
        """A merged site: its rows go back to the modules they came from, as tensors or as parts of a module."""
        weights = planned.choice.get("weights", [])
        if (whole := self.modules.get(path)) is not None:
            if not hasattr(whole, "rows"):
                return False
            parts = rule.restore(cast(Any, whole).rows, weights, planned.choice)
            if parts is None:
                return False
            del self.modules[path]
            self.modules |= {name.rpartition(".")[0]: part for name, part in parts.items()}
            return True
        found = False
        for role in ("weight", "bias"):
            merged = self.tensors.get(f"{path}.{role}")
            names = weights if role == "weight" else planned.choice.get("biases", [])
            if merged is None or (parts := rule.restore(rows_of(merged), names, planned.choice)) is None:
                continue
            self.tensors |= {
                n: nn.Parameter(p.detach().clone(), requires_grad=merged.requires_grad) for n, p in parts.items()
            }
            found = True
        return found

    def _original_module(self, path: str) -> nn.Module:
        """The module of the skeleton at ``path``; an empty one where the site has none of its own."""
        try:
            return self.skeleton.module.get_submodule(path)
        except AttributeError:
            return nn.Module()

    def module(self) -> nn.Module:
        module = self.skeleton.materialise(self.tensors.get, parameters=True)
        for path, replacement in self.modules.items():
            if path in self.rules and self.rules[path].attach(module, path, replacement):
                replacement.train(module.get_submodule(path).training)
            else:
                _replace(module, path, replacement, self.opt.training)
        held = dict(module.named_modules())
        for path in self.skeleton.caching:
            # A path may lie in a module that was replaced, and then there is nothing to switch on.
            if (own := getattr(held.get(path), "config", None)) is not None:
                own.use_cache = True
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False) and self._untied():
            config.tie_word_embeddings = False  # tied weights became two things; nothing may tie them again
        missing = _unfilled(module, self.tensors, self.skeleton.names, set(self.modules.values()))
        if missing:
            names = ", ".join(missing[:3])
            raise PlanError(f"no values for {names}: the sites that replaced them have no module form; undo them first")
        return module

    def _untied(self) -> bool:
        """Whether a module that shared a tensor under another name was replaced."""
        tied = (name for names in self.skeleton.names.values() if len(names) > 1 for name in names)
        return any(name.rpartition(".")[0] in self.modules for name in tied)


def _replace(root: nn.Module, path: str, replacement: nn.Module, training: bool) -> None:
    """Put ``replacement`` at ``path`` and wherever else the same module hangs, in the mode of what stood there."""
    parent, _, leaf = path.rpartition(".")
    above = root.get_submodule(parent)
    old = above._modules.get(leaf)
    replacement.train(training if old is None else old.training)
    above._modules[leaf] = replacement
    for module in list(root.modules()) if old is not None else ():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = replacement


def _unfilled(
    root: nn.Module, tensors: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], replacements: set[nn.Module]
) -> list[str]:
    """Tensors of the model that nothing gave a value to."""
    held = {n for n, _ in named_tensors(root)}
    wanting = [n for canonical, all_names in names.items() if canonical not in tensors for n in all_names if n in held]
    return [n for n in wanting if root.get_submodule(n.rpartition(".")[0]) not in replacements]
