"""The study's own base model and tasks, made of what comes with Python: ``python -m bdlora_perf.quality.small_study``.

The model is a Llama of 1.4 million parameters with a tokenizer of its own, trained from nothing on the docstrings of
the standard library. The tasks are far from that: ``code`` (continue the library's source), ``category`` (from a
character's Unicode name to its general category) and ``json`` (write given fields as JSON). Another version of Python
has other docstrings, and so gives another model.
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdlora_perf.quality.data import Example, make_batch, training_batches

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
# All sizes can be cut in 8 blocks; with 8 of them rank 2r has 0.89 times LoRA's parameters, close to the paper's 0.86.
SHAPE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_EOS = "<|end|>"
_SEQUENCE, _BATCH, _LEARNING_RATE = 64, 32, 3e-3
_LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "__pycache__")
_CODE_CHARACTERS = 400_000
_MOST_OF_A_CATEGORY = 300
_FIELDS = {
    "name": ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Henry"),
    "city": ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"),
    "color": ("red", "green", "blue", "black", "white", "yellow"),
    "file": ("config", "index", "module", "source", "test", "data"),
}
_NUMBERS = ("age", "size", "count")
_JSON_EXAMPLES = 3000


def make_study(folder: Path, steps: int, seed: int) -> None:
    """Write ``model/`` and ``tasks/`` into ``folder``."""
    trees = [tree for path in library_files() if (tree := _parse(path)) is not None]
    docstrings = [text for tree in trees for text in _docstrings(tree)]
    tokenizer = _train_tokenizer("\n\n".join(docstrings))
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    code = "\n\n".join(map(_without_docstrings, trees))[:_CODE_CHARACTERS]
    (tasks / "code.txt").write_text(code, encoding="utf-8")
    _write_pairs(tasks / "category.jsonl", _category_pairs(tokenizer, seed))
    _write_pairs(tasks / "json.jsonl", _json_pairs(seed))
    model = _pretrain(tokenizer, docstrings, steps, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def library_files() -> list[Path]:
    """The source files of the standard library, in a fixed order."""
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


def _docstrings(tree: ast.Module) -> Iterator[str]:
    return (ast.get_docstring(node) or "" for node in _documented(tree))


def _without_docstrings(tree: ast.Module) -> str:
    for node in _documented(tree):
        node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _train_tokenizer(text: str) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_EOS)


def _pretrain(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], steps: int, seed: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=end, eos_token_id=end, pad_token_id=end, **SHAPE)
    model = LlamaForCausalLM(config)
    # The end token is trained, too: adapters cannot teach it where the embedding is tied and frozen.
    ids = [token for text in texts for token in (*tokenizer(text, verbose=False)["input_ids"], end)]
    pieces = [Example(tuple(ids[i : i + _SEQUENCE]), 1) for i in range(0, len(ids) - _SEQUENCE, _SEQUENCE)]
    print(f"{len(ids):,} tokens, {model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    batches = training_batches(pieces, _BATCH, seed)
    for step in range(1, steps + 1):
        batch = make_batch(next(batches), end, torch.device("cpu"))
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


def _category_pairs(tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    """Balanced to a degree: the largest categories are cut."""
    by_category: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "").lower()
        if name and len(tokenizer(name)["input_ids"]) <= 24:
            by_category.setdefault(unicodedata.category(chr(code)), []).append(name)
    draw = random.Random(seed)
    pairs = [
        (f"{name} =", f" {category}")
        for category, names in sorted(by_category.items())
        if len(names) >= 50
        for name in draw.sample(names, min(len(names), _MOST_OF_A_CATEGORY))
    ]
    draw.shuffle(pairs)
    return pairs


def _json_pairs(seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    pairs = []
    for _ in range(_JSON_EXAMPLES):
        names = draw.sample((*_FIELDS, *_NUMBERS), 2)
        values = {name: draw.randrange(100) if name in _NUMBERS else draw.choice(_FIELDS[name]) for name in names}
        given = ", ".join(f"{name} is {value}" for name, value in values.items())
        pairs.append((f"{given}:", f" {json.dumps(values)}"))
    return list(dict.fromkeys(pairs))


def _write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model/ and tasks/ go")
    parser.add_argument("--steps", type=int, default=1500, help="of the training from nothing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_study(arguments.folder, arguments.steps, arguments.seed)
