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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

_LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "__pycache__")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
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
    """What the tasks take of source code.

    ``code`` is without documentation. ``summaries`` are the names of public functions by the first line of their
    documentation, where that is a whole sentence.
    """

    docstrings: list[str]
    summaries: dict[str, str]
    code: str

    @classmethod
    def read(cls, sources: Iterable[str]) -> "Library":
        """That of modules; one that is no source, as a template, is left out."""
        docstrings: list[str] = []
        summaries: dict[str, str] = {}
        code: list[str] = []
        for tree in filter(None, map(_parse, sources)):
            for node in [*ast.walk(tree)]:
                if not isinstance(node, _DOCUMENTED) or not (text := ast.get_docstring(node)):
                    continue
                docstrings.append(text)
                summary = text.partition("\n")[0].strip()
                if isinstance(node, _FUNCTIONS) and not node.name.startswith("_") and summary.endswith("."):
                    summaries.setdefault(summary, node.name)
                node.body = node.body[1:] or [ast.Pass()]
            code.append(ast.unparse(tree))
        return cls(docstrings, summaries, "\n\n".join(code))


def standard_library() -> Iterator[str]:
    """The source of this Python's library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not set(name.split("/")) & set(_LEFT_OUT):
            with suppress(UnicodeDecodeError):  # a few are in another encoding
                yield (root / name).read_text(encoding="utf-8")


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings(), suppress(SyntaxError):
        warnings.simplefilter("ignore")
        return ast.parse(source)
    return None


def write_tasks(folder: Path, library: Library, tokenizer: Any, seed: int) -> None:
    """Write every task into ``folder``; the tokenizer says which characters' names are short enough."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.txt").write_text(library.code[:_CODE_CHARACTERS], encoding="utf-8")
    (folder / "reference.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    names = [(f"{text} =", f" {name}") for text, name in library.summaries.items()]
    tasks = {"names": names, "category": category_pairs(tokenizer, seed), "json": json_pairs(seed)}
    for name, pairs in tasks.items():
        lines = (json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def category_pairs(tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    """From a character's name to its category. Balanced to a degree: the largest categories are cut."""
    named = {name.lower(): code for code in map(chr, range(sys.maxunicode + 1)) if (name := unicodedata.name(code, ""))}
    by_category: dict[str, list[str]] = {}
    for (name, character), ids in zip(named.items(), tokenizer([*named])["input_ids"], strict=True):
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
