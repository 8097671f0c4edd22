# SPDX-License-Identifier: Apache-2.0
"""Nested call arguments and results as *templates*: plain data that says where each tensor goes.

A program computes on a flat list of tensors. A template keeps everything else: the nesting, the constants, and the
type of the model's own output object. Templates are JSON values, so a saved program needs no pickle:

    {"tensor": i} | {"const": v} | {"list": [...]} | {"tuple": [...]} | {"dict": {name: ...}}
    | {"object": "<module>.<class>", "fields": {name: ...}}
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rewriter.errors import CaptureError, LoadError

Template = dict[str, Any]

_CONSTANTS = (bool, int, float, str, type(None))
# Result classes a template may name: transformers' plain dataclasses of tensors. Looking one up imports an installed
# module of this list and nothing else, so a hostile file cannot reach code through it.
_RESULT_MODULES = ("transformers.modeling_outputs",)


def flatten(value: Any, tensors: list[Tensor]) -> Template:
    """Append every tensor in ``value`` to ``tensors`` and return the template of the rest.

    Raises:
        CaptureError: an element is neither tensor, constant, list, tuple, mapping nor a dataclass-like output.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _CONSTANTS):
        return {"const": value}
    if isinstance(value, Mapping):
        fields = {str(k): flatten(v, tensors) for k, v in value.items()}
        return {"dict": fields} if type(value) is dict else {"object": _qualified(value), "fields": fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple
        fields = {k: flatten(v, tensors) for k, v in zip(value._fields, value, strict=True)}
        return {"object": _qualified(value), "fields": fields}
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return {"list": [flatten(v, tensors) for v in value]}
    raise CaptureError(
        f"a value of type {_qualified(value)} cannot be an argument or result of a captured program; use tensors, "
        "constants, lists, tuples and dicts of them (a key/value cache: call the module of opt.to_module() instead)"
    )


def rebuild(template: Template, tensors: Sequence[Tensor]) -> Any:
    """Inverse of :func:`flatten`."""
    if "tensor" in template:
        return tensors[template["tensor"]]
    if "const" in template:
        return template["const"]
    if "list" in template:
        return [rebuild(t, tensors) for t in template["list"]]
    if "tuple" in template:
        return tuple([rebuild(t, tensors) for t in template["tuple"]])
    fields = template["fields"] if "object" in template else template["dict"]
    values = {name: rebuild(t, tensors) for name, t in fields.items()}
    return result_class(template["object"])(**values) if "object" in template else values


def key(template: Template) -> tuple[Any, ...]:
    """A hashable stand-in for a template: equal for equal structures (and traceable by torch.compile)."""
    for kind in ("tensor", "const"):
        if kind in template:
            return (kind, type(template[kind]).__name__, template[kind])
    for kind in ("list", "tuple"):
        if kind in template:
            return (kind, *[key(t) for t in template[kind]])
    fields = template["fields"] if "object" in template else template["dict"]
    return ("dict", template.get("object"), *[(name, key(fields[name])) for name in sorted(fields)])


def text(template: Template) -> str:
    """The call a template stands for, readable: ``(input_ids=tensor, logits_to_keep=1)``."""
    if "tensor" in template:
        return "tensor"
    if "const" in template:
        return repr(template["const"])
    for kind in ("list", "tuple"):
        if kind in template:
            return "[" + ", ".join(text(t) for t in template[kind]) + "]"
    fields = template["fields"] if "object" in template else template["dict"]
    return "(" + ", ".join(f"{name}={text(t)}" for name, t in fields.items()) + ")"


def call_text(call: Template) -> str:
    """The call a template of ``(args, kwargs)`` stands for, readable: ``(tensor, mask=tensor)``."""
    args, kwargs = call["tuple"]
    named = [f"{name}={text(t)}" for name, t in kwargs["dict"].items()]
    return "(" + ", ".join([*(text(t) for t in args["tuple"]), *named]) + ")"


def leaves(template: Template, prefix: str = "") -> dict[int, str]:
    """Tensor position -> readable name ("input_ids", "hidden_states.0")."""
    if "tensor" in template:
        return {template["tensor"]: prefix or f"tensor_{template['tensor']}"}
    if "const" in template:
        return {}
    children: list[tuple[Any, Template]]
    if "list" in template or "tuple" in template:
        children = list(enumerate(template["list"] if "list" in template else template["tuple"]))
    else:
        children = list((template.get("fields") or template.get("dict") or {}).items())
    names: dict[int, str] = {}
    for name, child in children:
        names |= leaves(child, f"{prefix}.{name}" if prefix else str(name))
    return names


_classes: dict[str, type] = {}


def result_class(name: str) -> type:
    """The output class a template names.

    Raises:
        LoadError: not a class of an allowed module.
    """
    if name not in _classes:
        module, _, attribute = name.rpartition(".")
        if module not in _RESULT_MODULES or not attribute.isidentifier():
            raise LoadError(f"result type {name!r} is not one of {', '.join(_RESULT_MODULES)}")
        found = getattr(importlib.import_module(module), attribute, None)
        if not (isinstance(found, type) and issubclass(found, Mapping | dict)):
            raise LoadError(f"result type {name!r} is not an output class")
        _classes[name] = found
    return _classes[name]


def classes_of(template: Template) -> dict[str, type]:
    """Every class a template names, by name."""
    fields = template.get("fields") or template.get("dict") or {}
    children = template.get("list") or template.get("tuple") or list(fields.values())
    found = {name: cls for child in children for name, cls in classes_of(child).items()}
    return found | ({template["object"]: result_class(template["object"])} if "object" in template else {})


def is_storable(name: str) -> bool:
    """Whether a saved file may name this result class."""
    return name.rpartition(".")[0] in _RESULT_MODULES


def register_result_class(cls: type) -> None:
    """Remember the class of a result seen while capturing, so that outputs keep the model's own type."""
    _classes[f"{cls.__module__}.{cls.__qualname__}"] = cls


def _qualified(value: Any) -> str:
    register_result_class(type(value))
    return f"{type(value).__module__}.{type(value).__qualname__}"
