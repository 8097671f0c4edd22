# SPDX-License-Identifier: Apache-2.0
"""The text of the tiny language model: the sources of Python's standard library, split by file.

`files.json` beside this script is the authority. It pins every file of the three splits by the sha256 of
its text; `python corpus.py` chooses the splits anew from the running Python and writes it. The model was
trained on the Python release named there: another release carries other files, which is why the token ids
of all three splits are shipped as well (see `data.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PINNED = FOLDER / "files.json"
SPLITS = ("train", "calibration", "held_out")

# Trees that are tests, tables, third-party packages or build configuration rather than library text.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
# Modules that a generator wrote, or that are mostly one table.
SKIPPED_FILES = frozenset(
    {
        "html/entities.py",
        "keyword.py",
        "locale.py",
        "opcode.py",
        "re/_casefix.py",
        "stringprep.py",
        "symbol.py",
        "token.py",
        "lib2to3/pgen2/token.py",
        "tkinter/constants.py",
    }
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")

SEED = "tiny-lm-1"
# Budgets in characters (about 3.5 per token). A split takes files in the order of a seeded hash.
HELD_OUT_CHARACTERS = 400_000
CALIBRATION_CHARACTERS = 420_000
# Neither stubs nor a single large module may dominate a split.
SMALLEST, LARGEST = 2_000, 40_000
# Two files share text where they share this many consecutive lexemes (words, punctuation, white space).
# It is stricter than the promise it serves: no 50 consecutive *tokens* in two splits.
SHARED_LEXEMES = 30
_LEXEME = re.compile(r"\w+|[^\w\s]+|\s+")


class CorpusError(Exception):
    """The standard library of the running Python is not the one that was pinned."""


def normalise(data: bytes) -> str:
    """UTF-8 text with `\\n` newlines. Raises UnicodeDecodeError for the few files in another encoding."""
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def digest(text: str) -> str:
    """The sha256 of a normalised text, as pinned in `files.json`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _library_files(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.as_posix() in SKIPPED_FILES:
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = normalise(path.read_bytes())
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text


def library_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def choose_splits(texts: dict[str, str]) -> dict[str, list[str]]:
    """Splits by file: whatever shares text with another file, and whatever is tiny or huge, is for training.

    The rest is ordered by a seeded hash of its path; the held-out split takes the first files up to its
    budget, then the calibration split, and training gets what is left.
    """
    sharing = _files_sharing_text(texts)
    candidates = [path for path, text in texts.items() if path not in sharing and SMALLEST <= len(text) <= LARGEST]
    candidates.sort(key=lambda path: hashlib.sha256(f"{SEED}:{path}".encode()).digest())
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    budgets = {"held_out": HELD_OUT_CHARACTERS, "calibration": CALIBRATION_CHARACTERS}
    for path in candidates:
        open_split = next((split for split, left in budgets.items() if left > 0), None)
        if open_split is None:
            break
        chosen[open_split].append(path)
        budgets[open_split] -= len(texts[path])
    taken = {*chosen["held_out"], *chosen["calibration"]}
    chosen["train"] = [path for path in texts if path not in taken]
    return {split: sorted(paths) for split, paths in chosen.items()}


def _files_sharing_text(texts: dict[str, str]) -> set[str]:
    first_seen: dict[int, str] = {}
    sharing: set[str] = set()
    for path, text in texts.items():
        lexemes = _LEXEME.findall(text)
        for start in range(len(lexemes) - SHARED_LEXEMES + 1):
            window = hash(tuple(lexemes[start : start + SHARED_LEXEMES]))
            owner = first_seen.setdefault(window, path)
            if owner != path:
                sharing.update((owner, path))
    return sharing


def pin(splits: dict[str, list[str]], texts: dict[str, str]) -> None:
    """Writes `files.json`: the Python release, and for each split the sha256 of each file."""
    pinned = {
        "python": platform.python_version(),
        "splits": {split: {path: digest(texts[path]) for path in paths} for split, paths in splits.items()},
    }
    PINNED.write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")


def pinned_files(split: str) -> dict[str, str]:
    """Path (inside the standard library) → sha256 of the files of one split, in reading order."""
    files: dict[str, str] = json.loads(PINNED.read_text(encoding="utf-8"))["splits"][split]
    return files


def read_split(split: str, root: Path | None = None) -> list[str]:
    """The texts of one split from the running Python's library, each checked against its pinned sha256.

    Raises CorpusError naming the first file that is missing or differs.
    """
    root = root or library_root()
    texts = []
    for path, expected in pinned_files(split).items():
        file = root / path
        if not file.is_file():
            raise CorpusError(f"{path}: not in this Python's standard library; use the shipped token ids")
        text = normalise(file.read_bytes())
        if digest(text) != expected:
            raise CorpusError(f"{path}: differs from the pinned text; use the shipped token ids")
        texts.append(text)
    return texts


def main() -> None:
    """Chooses the splits from the running Python's standard library and pins them."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    texts = dict(_library_files(library_root()))
    splits = choose_splits(texts)
    pin(splits, texts)
    for split, paths in splits.items():
        print(f"{split:12} {len(paths):4} files {sum(len(texts[p]) for p in paths):9,} characters")


if __name__ == "__main__":
    main()
