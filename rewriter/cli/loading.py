# SPDX-License-Identifier: Apache-2.0
"""What the command line takes: models, passes with options, token files, select and expect expressions."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rewriter import registry, storage
from rewriter.calibration import Statistics, batches
from rewriter.errors import CaptureError, LoadError, PlanError
from rewriter.rules import Pass

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(name: str, dtype: str) -> nn.Module:
    """A model from a local transformers folder or ``module:callable``, in evaluation mode.

    Raises:
        CaptureError: neither; says what was looked for.
    """
    if dtype not in DTYPES:
        raise CaptureError(f"unknown dtype {dtype!r}{registry.nearest(dtype, DTYPES)}; one of {', '.join(DTYPES)}")
    model = _from_folder(Path(name)) if Path(name).is_dir() else _from_callable(name)
    return model.to(DTYPES[dtype]).eval()


def is_saved(name: str) -> bool:
    """Whether a path is a folder that ``Optimized.save`` wrote."""
    return (Path(name) / storage.MANIFEST).is_file() and (Path(name) / storage.GRAPH).is_file()


def _from_folder(folder: Path) -> nn.Module:
    if is_saved(str(folder)):
        raise CaptureError(f"{folder} is a rewritten model; rewriter.load reads it and rewriter export exports it")
    if not (folder / "config.json").is_file():
        raise CaptureError(f"{folder} has no config.json: not a transformers model folder")
    if not list(folder.glob("*.safetensors")):
        raise CaptureError(f"{folder} has no safetensors weights; pickled checkpoints are not read, convert them first")
    try:
        import transformers
    except ImportError as error:
        raise CaptureError("loading a model folder needs transformers: pip install 'fx-rewriter[examples]'") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        cls: Any = architecture or transformers.AutoModel
        model: nn.Module = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CaptureError(f"{folder}: transformers cannot load it: {error}") from error
    return model


def _from_callable(name: str) -> nn.Module:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise CaptureError(
            f"MODEL {name!r} is neither a folder nor module:callable (for example mypackage.models:build)"
        )
    if os.getcwd() not in sys.path:  # as `python -m` would: an installed script does not look where the user stands
        sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CaptureError(f"MODEL {name!r} cannot be imported: {error}") from error
    try:
        built: Any = build()
    except Exception as error:  # the user's code may raise anything
        raise CaptureError(f"MODEL {name!r}: calling {attribute}() raised {type(error).__name__}: {error}") from error
    if not isinstance(built, nn.Module):
        raise CaptureError(f"{name} returned a {type(built).__name__}, not a torch.nn.Module")
    return built


def load_example(path: Path | None) -> dict[str, Tensor] | None:
    """Example inputs: a safetensors file whose tensors are called like the arguments of forward. Raises LoadError."""
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{path}: not a safetensors file of example inputs named as forward's arguments ({error})"
        ) from error


def load_tokens(path: Path, limit: int | None = None) -> Tensor:
    """Token windows ``input_ids [n, length]`` of a safetensors file. Raises LoadError."""
    try:
        with safe_open(path, "pt") as file:
            tokens: Tensor = file.get_tensor("input_ids")
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: not a safetensors file with a tensor input_ids ({error})") from error
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise LoadError(
            f"{path}: input_ids must be integers of shape [n, length], not {tokens.dtype} {tuple(tokens.shape)}"
        )
    return tokens[:limit].long()


def load_calibration(path: Path | None, rows: int) -> Any:
    """Batches of a token file, or saved :class:`Statistics`. Raises LoadError."""
    if path is None:
        return None
    return Statistics.load(path) if _is_statistics(path) else list(batches(load_tokens(path, rows)))


def _is_statistics(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "rewriter.statistics" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False  # load_tokens says what is wrong with it


def parse_passes(text: str) -> list[Pass]:
    """``"fuse,shift_add:bits=4:embeddings=true,vq_logits"`` -> instances. Raises PlanError."""
    return [_parse_pass(part.strip()) for part in text.split(",") if part.strip()]


def _parse_pass(text: str) -> Pass:
    name, *options = text.split(":")
    if name not in registry.known():
        return registry.make(name, {})  # raises, naming the nearest
    types_ = typing.get_type_hints(registry.known()[name])
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise PlanError(f"option {option!r} of pass {name} must be written option=value")
        values[key] = _convert(value, types_.get(key, str), f"{name}:{key}")
    return registry.make(name, values)


def _convert(text: str, kind: Any, what: str) -> Any:
    """The text as the option's declared type; of a union, as the first member that takes it."""
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for member in sorted(members, key=lambda m: m is str):  # a str takes anything: last
        if member is type(None) and text.lower() in ("none", "null"):
            return None
        if member is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
        if member is str or typing.get_origin(member) is typing.Literal:
            return text
    wanted = " or ".join(getattr(m, "__name__", str(m)) for m in members)
    raise PlanError(f"{what} takes {wanted}, not {text!r}")


def parse_pairs(items: Sequence[str], what: str) -> dict[str, str | None]:
    """``["lm_head=vq_logits", "re:.*mlp.*=none"]`` -> mapping; ``none`` protects. Raises PlanError."""
    pairs: dict[str, str | None] = {}
    for item in items:
        key, equals, value = item.rpartition("=")
        if not equals or not key:
            raise PlanError(f"{what} {item!r} must be written NAME=VALUE")
        pairs[key] = None if value.lower() == "none" else value
    return pairs


def parse_counts(items: Sequence[str]) -> dict[str, int]:
    """``["shift_add=12"]`` -> mapping. Raises PlanError."""
    counts = {}
    for key, value in parse_pairs(items, "--expect").items():
        if value is None or not value.isdigit():
            raise PlanError(f"--expect {key}={value} must end in a number of sites")
        counts[key] = int(value)
    return counts


def describe_pass(cls: type[Pass]) -> dict[str, Any]:
    """Name, contract, one-line description and options of a pass, as data."""
    hints = typing.get_type_hints(cls)
    text = inspect.getdoc(cls) or ""
    meanings = _attributes(text)
    return {
        "name": cls.name,
        "contract": str(cls.contract),
        "recipe": cls.contract.recipe,
        "summary": text.partition("\n\n")[0].replace("\n", " "),
        "options": [
            {
                "name": f.name,
                "type": getattr(hints[f.name], "__name__", str(hints[f.name])).replace(" | ", " or "),
                "default": f.default,
                "meaning": meanings.get(f.name, ""),
            }
            for f in dataclasses.fields(cls)
        ],
    }


def _attributes(docstring: str) -> dict[str, str]:
    """The "Attributes:" section of a docstring: name -> text, in one line each."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        text = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ": " in text:
            name, _, text = text.partition(": ")
        if name:
            found[name] = f"{found.get(name, '')} {text}".strip().replace("``", "").replace("`", "")
    return found
