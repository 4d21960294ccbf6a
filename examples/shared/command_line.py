"""The command lines of the examples: options that they share, and errors that a user can mend."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bdlora_sglang.errors import BDLoRAError

Model = Annotated[str | None, typer.Option(help="The base model, a folder or a hub name; default: a small random one.")]
Data = Annotated[Path, typer.Option(help='JSON lines of {"prompt": ..., "completion": ...}.')]
TPDegree = Annotated[int, typer.Option("--tp", min=1, help="The TP degree to serve at: the number of blocks.")]
Rank = Annotated[int, typer.Option(min=1, help="Whole rank, all blocks together.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of training.")]
LearningRate = Annotated[float, typer.Option(help="Of AdamW.")]
Seed = Annotated[int, typer.Option(help="Of the initial values and of the order of the data.")]


def run(main: Callable[..., None]) -> None:
    """Run ``main`` by the options that its arguments declare; a `BDLoRAError` becomes its message and exit code 1."""
    try:
        typer.run(main)
    except BDLoRAError as error:
        sys.exit(str(error))
