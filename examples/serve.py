"""Serve the adapters that the other examples made, all in one batch, and show what each answers.

Run ``python -m examples.serve --tp 2``, or with folders: ``python -m examples.serve my-adapter other-adapter``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdlora_sglang.errors import BDLoRAError
from examples.shared.command_line import Data, Model, run
from examples.shared.data import OPPOSITES, read_rows
from examples.shared.training import WORK, base_model


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Adapters; default: those that examples made.")] = None,
    model: Model = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="TP degree, whatever the adapters' block counts.")] = 2,
    data: Data = OPPOSITES,
    prompts: Annotated[int, typer.Option(min=1, help="How many of the data's first prompts are asked.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 6,
) -> None:
    """Ask the base model and every adapter the same."""
    folders = folders or sorted(path.parent for path in WORK.glob("adapters/*/adapter_config.json"))
    if not folders:
        raise BDLoRAError(f"{WORK / 'adapters'}: found no adapter, expected one of another example, or folders")
    asked = [row.prompt for row in read_rows(data)[:prompts]]
    table = Table("prompt", "base model", *(folder.name for folder in folders), title=f"Served at TP {tp}")
    for prompt, answers in zip(asked, answer(base_model(model), folders, tp, asked, new_tokens), strict=True):
        table.add_row(Text(prompt), *(Text(ascii(text)) for text in answers))
    Console().print(table)


def answer(model: str, folders: Sequence[Path], tp: int, prompts: Sequence[str], new_tokens: int) -> list[list[str]]:
    """For each prompt the base model's answer and every adapter's, all from one batch."""
    from bdlora_sglang import Engine

    names = [None, *(folder.name for folder in folders)]
    engine = Engine(model_path=model, tp_size=tp, lora_paths=[f"{folder.name}={folder}" for folder in folders])
    try:
        answers = engine.generate(
            [prompt for prompt in prompts for _ in names],
            {"temperature": 0, "max_new_tokens": new_tokens},
            lora_path=names * len(prompts),
        )
    finally:
        engine.shutdown()
    texts = [str(found["text"]) for found in answers]
    return [texts[start : start + len(names)] for start in range(0, len(texts), len(names))]


if __name__ == "__main__":  # SGLang starts its ranks as processes that import this file
    run(main)
