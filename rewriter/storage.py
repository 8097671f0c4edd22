# SPDX-License-Identifier: Apache-2.0
"""The stored format: a folder of safetensors and JSON that is read back without running code
(docs/format.md).

    manifest.json       format version, digests of the other files, one record per tensor, aliases, extra
    model.safetensors   every tensor once; wide floats that are half-precision numbers as float16
    graph.json          the programs: signature key, call and result templates, and the node list of graphio
    plan.json           the plan, as the planner wrote it

A folder appears whole or not at all. Nothing in it is pickled, imported, evaluated or compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rewriter import jsonfile
from rewriter.errors import ExportError, LoadError
from rewriter.files import atomic_directory, check_replaceable, check_writable
from rewriter.graphio import graph_from_json
from rewriter.narrow import stored_bytes
from rewriter.tensorfile import (
    alias_groups,
    as_recorded,
    check_record,
    check_storable,
    read_tensors,
    record_of,
    write_tensors,
)
from rewriter.version import __version__

__all__ = ["FORMAT_VERSION", "MIGRATIONS", "Stored", "StoredProgram", "read", "stored_bytes", "write"]

Json = Any
FORMAT = "rewriter"
FORMAT_VERSION = 1

MANIFEST, TENSORS, GRAPH, PLAN = "manifest.json", "model.safetensors", "graph.json", "plan.json"
_MEBIBYTE = 1 << 20
_LIMITS = {MANIFEST: 64 * _MEBIBYTE, GRAPH: 512 * _MEBIBYTE, PLAN: 64 * _MEBIBYTE}
_MAX_PROGRAMS = 1000
_MAX_TEMPLATE_DEPTH = 32

# The three JSON files by name. A migration takes those of its version to the next one.
Documents = dict[str, Json]
MIGRATIONS: dict[int, Callable[[Documents], Documents]] = {}


@dataclass(frozen=True)
class StoredProgram:
    """One program: signature key, call and result templates, graph over flat tensors, tensors of its own."""

    key: Json
    call: Json
    result: Json
    graph_module: fx.GraphModule
    constants: dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    `tensors` has every name, aliases included; equal kinds of one alias group are one object. `aliases` maps
    the first name of each group of several to all of its names.
    """

    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    persistent: frozenset[str]
    aliases: dict[str, tuple[str, ...]]
    programs: tuple[StoredProgram, ...]
    plan: dict[str, Json]
    extra: dict[str, Json]


def write(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor],
    parameters: AbstractSet[str],
    persistent: AbstractSet[str],
    programs: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Json],
    extra: Mapping[str, Json],
) -> Path:
    """Write a folder atomically; an existing one is replaced only if this function wrote it.

    Args:
        path: the folder; missing parents are created.
        tensors: every parameter and buffer by name, tied ones under each of their names; dense, on any
            device.
        parameters: names of those that are parameters; the others are buffers.
        persistent: names of the buffers that belong to a state dict (parameters always do).
        programs: mappings with the keys `key`, `call`, `result`, `graph` (of `graph_to_json`) and, where a
            program reads tensors of its own, `constants` (name -> tensor), which come before `tensors` of the
            same name.
        plan, extra: JSON-able.

    Returns:
        The folder, with symbolic links resolved.

    Raises:
        ExportError: something cannot be saved, or the path cannot be written; nothing has changed then.
    """
    target = check_target(path)
    _check_names(tensors, parameters, persistent)
    constants = [_constants_of(program) for program in programs]
    groups = [sorted(names, key=lambda name: name not in parameters) for names in alias_groups(tensors)]
    graph = _graph_document(programs, tensors, constants)
    plan = jsonfile.plain(plan, ExportError)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "written_by": {"rewriter": __version__, "torch": torch.__version__},
        "tensors": {
            name: record_of(t, parameter=name in parameters, persistent=name in persistent | parameters)
            for name, t in tensors.items()
        },
        "constants": [
            {name: record_of(t, parameter=False, persistent=False) for name, t in own.items()} for own in constants
        ],
        "aliases": {names[0]: names for names in groups if len(names) > 1},
        "extra": jsonfile.plain(extra, ExportError),
    }
    stored = {names[0]: tensors[names[0]] for names in groups}
    stored |= {_constant(i, name): tensor for i, own in enumerate(constants) for name, tensor in own.items()}
    with atomic_directory(target, _is_ours) as folder:
        write_tensors(folder / TENSORS, stored)
        jsonfile.write(folder / GRAPH, graph)
        jsonfile.write(folder / PLAN, plan, indent=1)
        digests = {name: jsonfile.digest(folder / name) for name in (TENSORS, GRAPH, PLAN)}
        jsonfile.write(folder / MANIFEST, manifest | {"files": digests}, indent=1)
    return target


def read(path: str | os.PathLike[str]) -> Stored:
    """Read a folder that `write` made, on the CPU. Runs no code from it.

    Raises:
        LoadError: the folder is missing, truncated, mixed from several saves, foreign, hostile, or newer than
            this version; the message names the file and the reason.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder; give the folder that save() wrote")
    documents: Documents = {MANIFEST: jsonfile.read(folder / MANIFEST, _LIMITS[MANIFEST])}
    version = _version(documents[MANIFEST], folder / MANIFEST)
    _check_digests(folder, documents[MANIFEST])
    for name in (GRAPH, PLAN):
        documents[name] = jsonfile.read(folder / name, _LIMITS[name])
    documents = _migrated(documents, version)
    manifest = documents[MANIFEST]
    with _about(folder / MANIFEST):
        _check_manifest(manifest)
    with _about(folder / TENSORS):
        tensors, constants = _load_tensors(folder / TENSORS, manifest)
    with _about(folder / GRAPH):
        programs = _read_programs(documents[GRAPH], tensors, constants)
    if not isinstance(documents[PLAN], dict):
        raise LoadError(f"{folder / PLAN}: not a plan: an object is expected")
    records = manifest["tensors"]
    return Stored(
        tensors=tensors,
        parameters=frozenset(name for name, record in records.items() if record["parameter"]),
        persistent=frozenset(name for name, record in records.items() if record["persistent"]),
        aliases={name: tuple(names) for name, names in manifest["aliases"].items()},
        programs=programs,
        plan=documents[PLAN],
        extra=manifest["extra"],
    )


class _about:
    """Puts the file's path before the message of a LoadError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, reason: BaseException | None, trace: object) -> None:
        if isinstance(reason, LoadError):
            raise LoadError(f"{self.path}: {reason}") from reason


def check_target(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that `write` could not write, before long work; return it with symbolic links resolved.

    Raises:
        ExportError: not writable, a file, or a folder that holds something else.
    """
    target = check_writable(path)
    check_replaceable(target, _is_ours)
    return target


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what `write` puts there, so that replacing it loses nothing else."""
    if {entry.name for entry in folder.iterdir()} - {MANIFEST, TENSORS, GRAPH, PLAN}:
        return False
    try:
        manifest = jsonfile.read(folder / MANIFEST, _LIMITS[MANIFEST])
    except LoadError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _check_names(tensors: Mapping[str, Tensor], parameters: AbstractSet[str], persistent: AbstractSet[str]) -> None:
    for name, tensor in tensors.items():
        check_storable(name, tensor)
    for kind, names in (("parameter", parameters), ("persistent tensor", persistent)):
        unknown = sorted(names - tensors.keys())
        if unknown:
            raise ExportError(f"{kind} {unknown[0]!r} is not among the tensors")


def _constants_of(program: Mapping[str, Any]) -> dict[str, Tensor]:
    constants = dict(program.get("constants", {}))
    for name, tensor in constants.items():
        check_storable(name, tensor)
    return constants


def _graph_document(
    programs: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    constants: Sequence[Mapping[str, Tensor]],
) -> Json:
    """What goes into graph.json; read once before it is written, so that every saved folder loads."""
    document = {
        "format": f"{FORMAT}.graph",
        "version": FORMAT_VERSION,
        "programs": [
            jsonfile.plain({k: v for k, v in program.items() if k != "constants"}, ExportError) for program in programs
        ],
    }
    try:
        _read_programs(document, tensors, constants)
    except LoadError as reason:
        raise ExportError(f"a program cannot be saved: {reason}") from reason
    return document


def _constant(program: int, name: str) -> str:
    """Name in the file of a program's own tensor; "/" keeps it apart from every other name."""
    return f"{program}/{name}"


def _version(manifest: Json, path: Path) -> int:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LoadError(f"{path}: not a manifest of rewriter; give the folder that save() wrote")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise LoadError(f"{path}: the format version {str(version)[:40]!r} is not a positive integer")
    if version > FORMAT_VERSION:
        raise LoadError(
            f"{path}: written by a newer version of rewriter (format {version}, this version reads up to "
            f"{FORMAT_VERSION}); update rewriter"
        )
    return version


def _check_digests(folder: Path, manifest: dict[str, Json]) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict) or files.keys() != {TENSORS, GRAPH, PLAN}:
        raise LoadError(f"{folder / MANIFEST}: 'files' must name exactly {TENSORS}, {GRAPH} and {PLAN}")
    for name in (TENSORS, GRAPH, PLAN):
        jsonfile.check_digest(folder / name, files[name])


def _migrated(documents: Documents, version: int) -> Documents:
    """Documents of an older format, taken step by step to this one."""
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise LoadError(f"format {version} can no longer be read; load and save it with an older rewriter")
        documents, version = MIGRATIONS[version](documents), version + 1
    return documents


def _check_manifest(manifest: dict[str, Json]) -> None:
    keys = {"format", "version", "written_by", "files", "tensors", "constants", "aliases", "extra"}
    if manifest.keys() != keys:
        raise LoadError(f"expected the keys {sorted(keys)}, found {sorted(manifest)}")
    tables = [manifest[key] for key in ("tensors", "aliases", "extra")]
    if not isinstance(manifest["constants"], list) or not all(
        isinstance(table, dict) for table in (*tables, *manifest["constants"])
    ):
        raise LoadError("'tensors', 'aliases', 'extra' and the members of 'constants' must be objects")
    for table in (manifest["tensors"], *manifest["constants"]):
        for name, record in table.items():
            check_record(name, record)
    _check_aliases(manifest["aliases"], manifest["tensors"])


def _check_aliases(aliases: dict[str, Json], records: dict[str, Json]) -> None:
    seen: set[str] = set()
    for first, names in aliases.items():
        if not isinstance(names, list) or len(names) < 2 or names[0] != first:
            raise LoadError(f"the aliases of {first[:80]!r} are malformed")
        for name in names:
            if not isinstance(name, str) or name not in records or name in seen:
                raise LoadError(f"alias {str(name)[:80]!r} is unknown or named twice")
            seen.add(name)
            if any(records[name][key] != records[first][key] for key in ("dtype", "shape")):
                raise LoadError(f"alias {name!r} differs from {first!r} in dtype or shape")


def _load_tensors(path: Path, manifest: dict[str, Json]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    records: dict[str, Json] = manifest["tensors"]
    first_of = {name: first for first, names in manifest["aliases"].items() for name in names}
    stored = {name: record for name, record in records.items() if first_of.get(name, name) == name}
    for i, own in enumerate(manifest["constants"]):
        stored |= {_constant(i, name): record for name, record in own.items()}
    loaded = read_tensors(path, stored)
    kind = ("parameter", "requires_grad")
    tensors = {}
    for name, record in records.items():
        first = first_of.get(name, name)
        alike = all(record[key] == records[first][key] for key in kind)
        tensors[name] = loaded[first] if alike else as_recorded(loaded[first], record)
    constants = [{name: loaded[_constant(i, name)] for name in own} for i, own in enumerate(manifest["constants"])]
    return tensors, constants


def _read_programs(
    document: Json, tensors: Mapping[str, Tensor], constants: Sequence[Mapping[str, Tensor]]
) -> tuple[StoredProgram, ...]:
    if not isinstance(document, dict) or document.keys() != {"format", "version", "programs"}:
        raise LoadError("not a list of programs")
    if document["format"] != f"{FORMAT}.graph" or document["version"] != FORMAT_VERSION:
        raise LoadError("its format or version does not fit the manifest")
    programs = document["programs"]
    if not isinstance(programs, list) or len(programs) > _MAX_PROGRAMS:
        raise LoadError(f"'programs' is not a list of at most {_MAX_PROGRAMS}")
    if len(programs) != len(constants):
        raise LoadError(f"{len(programs)} programs, but constants of {len(constants)}")
    read_programs = []
    for index, (program, own) in enumerate(zip(programs, constants, strict=True)):
        try:
            read_programs.append(_read_program(program, tensors, own))
        except LoadError as reason:
            raise LoadError(f"program {index}: {reason}") from reason
    return tuple(read_programs)


def _read_program(program: Json, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> StoredProgram:
    if not isinstance(program, dict) or program.keys() != {"key", "call", "result", "graph"}:
        raise LoadError("it must have exactly the keys key, call, result and graph")
    module = graph_from_json(program["graph"], lambda name: own[name] if name in own else tensors[name])
    inputs = sum(node.op == "placeholder" for node in module.graph.nodes)
    outputs = module.graph.output_node().args[0]
    if not isinstance(outputs, (list, tuple)) or not all(isinstance(node, fx.Node) for node in outputs):
        raise LoadError("its output is not a flat list of nodes")
    _check_template(program["call"], inputs, "call")
    _check_template(program["result"], len(outputs), "result")
    return StoredProgram(program["key"], program["call"], program["result"], module, dict(own))


def _check_template(template: Json, tensors: int, what: str, depth: int = 0) -> None:
    """Refuse what is not a template (see structure) over that many tensors.

    Names of result classes are texts here; whoever builds the result decides which classes it knows.
    """
    if depth > _MAX_TEMPLATE_DEPTH or not isinstance(template, dict):
        raise LoadError(f"the {what} template is malformed or nested too deeply")
    kinds = frozenset(template)
    content = next(iter(template.values()), None)
    if kinds == {"tensor"} and type(content) is int and 0 <= content < tensors:
        return
    if kinds == {"const"} and (content is None or isinstance(content, (bool, int, float, str))):
        return
    children: Sequence[Json]
    if kinds in ({"list"}, {"tuple"}) and isinstance(content, list):
        children = content
    elif kinds == {"dict"} and isinstance(content, dict):
        children = list(content.values())
    elif kinds == {"object", "fields"} and isinstance(template["fields"], dict) and _is_class(template["object"]):
        children = list(template["fields"].values())
    else:
        raise LoadError(f"the {what} template holds {str(template)[:80]!r}")
    for child in children:
        _check_template(child, tensors, what, depth + 1)


def _is_class(name: Json) -> bool:
    """Module path and class name, e.g. "transformers.modeling_outputs.CausalLMOutput"."""
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
