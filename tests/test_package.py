# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: what the wheel holds, what an import costs, and rules every file keeps."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from compat.wheel import PACKAGES, ROOT, build_wheel

PUBLIC = {
    "capture",
    "find",
    "explain",
    "calibrate",
    "plan",
    "apply",
    "verify",
    "evaluate",
    "load",
    "export_onnx",
    "rule",
    "optimize",
}
HEAVY = {"transformers", "triton", "onnx", "onnxscript", "onnxruntime", "matplotlib"}
LIBRARIES = HEAVY | {"torch", "networkx", "rich", "typer", "numpy", "safetensors"}
LICENCE_LINE = "# SPDX-License-Identifier: Apache-2.0\n"


def library_files() -> Iterator[tuple[str, Path]]:
    """(path inside the import name ``rewriter``, path on disk) of every library source file."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            inside = path.relative_to(ROOT / package).as_posix()
            yield (f"rewriter/{inside}" if package == "rewriter" else f"rewriter/{package}/{inside}"), path


def project_files() -> list[Path]:
    """Every file of the project: what git tracks or would track; outside a checkout, what is not hidden or built."""
    if not (ROOT / ".git").exists():
        made = {"build", "out", "dist", "__pycache__"}
        inside = ((path, path.relative_to(ROOT).parts) for path in sorted(ROOT.rglob("*")) if path.is_file())
        return [path for path, parts in inside if not made & set(parts) and not parts[0].startswith(".")]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(set(listed.split("\0"))) if (path := ROOT / name).is_file()]


def run_python(code: str) -> str:
    """What ``code`` prints in an interpreter of its own, away from the repository's folders."""
    elsewhere = Path(sys.executable).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def test_wheel_has_one_import_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"rewriter"}


def test_wheel_has_every_source_file(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel.namelist() if name.endswith(".py")} == {inside for inside, _ in library_files()}
    assert "rewriter/py.typed" in wheel.namelist()


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "fx-rewriter"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == run_python("import rewriter; print(rewriter.__version__)")
    assert "rewriter = rewriter.cli.app:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert b"Version 2.0, January 2004" in wheel.read(f"{folder}/licenses/LICENSE")


def test_console_script_exists() -> None:
    assert run_python("from rewriter.cli.app import main; print(callable(main))") == "True"


def test_every_package_is_listed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {inside.rpartition("/")[0].replace("/", ".") for inside, _ in library_files()}
    assert listed == folders


def test_every_package_has_an_init() -> None:
    missing = {path.parent for _, path in library_files() if not (path.parent / "__init__.py").exists()}
    assert not missing


def test_no_file_is_called_like_a_public_function_or_a_library() -> None:
    taken = {inside: path.stem for inside, path in library_files() if path.stem in PUBLIC | LIBRARIES}
    assert not taken


def test_every_python_file_has_its_licence_line() -> None:
    python = [path for path in project_files() if path.suffix == ".py"]
    assert len(python) > len(list(library_files()))
    without = [path for path in python if not path.read_text(encoding="utf-8").startswith(LICENCE_LINE)]
    assert not without


def test_the_library_prints_nothing() -> None:
    prints = [
        f"{inside}:{node.lineno}"
        for inside, path in library_files()
        if not inside.startswith("rewriter/cli/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints


def imported(path: Path) -> set[str]:
    """Names of the modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_dependencies_point_one_way() -> None:
    """Kernels know nothing of the engine; the engine knows no family of passes or kernels by name."""
    folders = [path.parent for side in ("kernels", "passes") for path in (ROOT / side).glob("*/__init__.py")]
    families = tuple(f"rewriter.{folder.parent.name}.{folder.name}" for folder in folders)
    assert len(families) >= 5
    for inside, path in library_files():
        ours = {name for name in imported(path) if name.split(".")[0] == "rewriter"}
        if inside.startswith("rewriter/kernels/"):
            assert all(name.startswith("rewriter.kernels") for name in ours), inside
        elif not inside.startswith(("rewriter/passes/", "rewriter/codegen/")):
            assert not [name for name in ours if name.startswith(families)], inside


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|tmp/brief|tmp/bash_jobs)/")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and token ids
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in place.finditer(text)]
    assert not found


def test_import_is_light() -> None:
    loaded = set(run_python("import sys, rewriter; print(*sys.modules)").split())
    assert "rewriter" in loaded
    assert not HEAVY & loaded


def test_importing_the_kernels_package_registers_no_operator() -> None:
    code = """
import torch
def ours(): return sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rewriter::"))
import rewriter, rewriter.kernels, rewriter.kernels.shift_add, rewriter.kernels.vq_logits
before = ours()
import rewriter.kernels.vq_logits.op
print(len(before), len(ours()) > 0)
"""
    assert run_python(code) == "0 True"
