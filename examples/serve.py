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
    dtype: Annotated[
        str, typer.Option(help="float32 is what PEFT computes in; auto, SGLang's default, 16 bits.")
    ] = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 6,
) -> None:
    """Ask the base model and every adapter the same."""
    folders = folders or sorted(path.parent for path in WORK.glob("adapters/*/adapter_config.json"))
    if not folders:
        raise BDLoRAError(f"{WORK / 'adapters'}: found no adapter, expected one of another example, or folders")
    asked = [row.prompt for row in read_rows(data)[:prompts]]
    table = Table("adapter", *asked, title=f"Served at TP {tp}")
    for name, texts in answer(base_model(model), folders, tp, dtype, asked, new_tokens).items():
        table.add_row(name, *(Text(ascii(text)) for text in texts))
    Console().print(table)


def answer(
    model: str, folders: Sequence[Path], tp: int, dtype: str, prompts: Sequence[str], new_tokens: int
) -> dict[str, list[str]]:
    """The answers of the base model and of every adapter, by name, one for each prompt; all from one batch."""
    from bdlora_sglang import Engine

    paths = {folder.name: folder for folder in folders}
    engine = Engine(
        model_path=model, tp_size=tp, dtype=dtype, lora_paths=[f"{name}={path}" for name, path in paths.items()]
    )
    asked = [(name, prompt) for name in (None, *paths) for prompt in prompts]
    try:
        answers = engine.generate(
            [prompt for _, prompt in asked],
            {"temperature": 0, "max_new_tokens": new_tokens},
            lora_path=[name for name, _ in asked],
        )
    finally:
        engine.shutdown()
    found: dict[str, list[str]] = {}
    for (name, _), reply in zip(asked, answers, strict=True):
        found.setdefault(name or "base model", []).append(str(reply["text"]))
    return found


if __name__ == "__main__":  # SGLang starts its ranks as processes that import this file
    run(main)
