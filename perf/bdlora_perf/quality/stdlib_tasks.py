"""Tasks made of what comes with Python: its library's source and documentation, and the names of Unicode's characters.

``code`` continues the source, ``reference`` the language reference (English prose); ``names`` goes from the first line
of a function's documentation to its name, ``category`` from a character's name to its general category, and ``json``
writes given fields as JSON. Another version of Python has other texts.
"""

import ast
import json
import random
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

_LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "__pycache__")
_CODE_CHARACTERS = 400_000
_CATEGORY_TOKENS, _MOST_OF_A_CATEGORY = 24, 300
_FIELDS = {
    "name": ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Henry"),
    "city": ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"),
    "color": ("red", "green", "blue", "black", "white", "yellow"),
    "file": ("config", "index", "module", "source", "test", "data"),
}
_NUMBERS = ("age", "size", "count")
_JSON_EXAMPLES = 3000


@dataclass(frozen=True)
class Library:
    """Source, parsed."""

    trees: tuple[ast.Module, ...]

    @classmethod
    def standard(cls) -> "Library":
        """That of this Python."""
        return cls(tuple(tree for path in _source_files() if (tree := _parse(path)) is not None))

    def docstrings(self) -> list[str]:
        return [_docstring(node) for tree in self.trees for node in _documented(tree)]

    def summaries(self) -> dict[str, str]:
        """The name of each public function by the first line of its documentation, where that is a whole sentence."""
        names: dict[str, str] = {}
        for node in (node for tree in self.trees for node in _documented(tree)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                summary = _docstring(node).partition("\n")[0].strip()
                if summary.endswith("."):
                    names.setdefault(summary, node.name)
        return names

    def code(self) -> str:
        """Without documentation."""
        return "\n\n".join(map(_code, self.trees))


def write_tasks(folder: Path, library: Library, tokenizer: Any, seed: int) -> None:
    """Write every task into ``folder``; the tokenizer says which characters' names are short enough."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.txt").write_text(library.code()[:_CODE_CHARACTERS], encoding="utf-8")
    (folder / "reference.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    _write_pairs(folder / "names.jsonl", ((f"{text} =", f" {name}") for text, name in library.summaries().items()))
    _write_pairs(folder / "category.jsonl", category_pairs(tokenizer, seed))
    _write_pairs(folder / "json.jsonl", json_pairs(seed))


def _source_files() -> list[Path]:
    """In a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(_LEFT_OUT))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None  # a template, or a file of another encoding


def _documented(tree: ast.Module) -> Iterator[Any]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node))


def _docstring(node: Any) -> str:
    return ast.get_docstring(node) or ""


def _code(tree: ast.Module) -> str:
    bodies = {node: node.body for node in _documented(tree)}
    try:
        for node, body in bodies.items():
            node.body = body[1:] or [ast.Pass()]
        return ast.unparse(tree)
    finally:
        for node, body in bodies.items():
            node.body = body


def category_pairs(tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    """From a character's name to its category. Balanced to a degree: the largest categories are cut."""
    named = [
        (chr(code), name.lower()) for code in range(sys.maxunicode + 1) if (name := unicodedata.name(chr(code), ""))
    ]
    by_category: dict[str, list[str]] = {}
    for (character, name), ids in zip(named, tokenizer([name for _, name in named])["input_ids"], strict=True):
        if len(ids) <= _CATEGORY_TOKENS:
            by_category.setdefault(unicodedata.category(character), []).append(name)
    draw = random.Random(seed)
    pairs = [
        (f"{name} =", f" {category}")
        for category, names in sorted(by_category.items())
        if len(names) >= 50
        for name in draw.sample(names, min(len(names), _MOST_OF_A_CATEGORY))
    ]
    draw.shuffle(pairs)
    return pairs


def json_pairs(seed: int) -> list[tuple[str, str]]:
    """From given fields to JSON."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(_JSON_EXAMPLES):
        names = draw.sample((*_FIELDS, *_NUMBERS), 2)
        values = {name: draw.randrange(100) if name in _NUMBERS else draw.choice(_FIELDS[name]) for name in names}
        given = ", ".join(f"{name} is {value}" for name, value in values.items())
        pairs.append((f"{given}:", f" {json.dumps(values)}"))
    return list(dict.fromkeys(pairs))


def _write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
