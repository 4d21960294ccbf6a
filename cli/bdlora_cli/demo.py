"""``bdlora demo``: a small model with adapters, served for real, and every token checked against PEFT."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from bdlora_cli.demo_server import Answer, DemoServer

FOLDER = Path(".demo")
PROMPT = "Once upon a time there was a little adapter"
NEW_TOKENS = 16
# Past the end of a sentence too: PEFT's answer and the server's are to be of the same length.
_SAMPLING = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}

# Name: whole rank, blocks (None: plain LoRA). The last one is loaded over the API when the server runs.
_ADAPTERS: dict[str, tuple[int, int | None]] = {
    "bd-2": (8, 2),
    "bd-4": (16, 4),
    "lora-r4": (4, None),
    "lora-r16": (16, None),
}
_LATE_NAME = "bd-8"
_LATE = (16, 8)


@dataclass(frozen=True)
class Request:
    """One request, the adapter that it asked for (None: the base model) and what came back."""

    how: str
    adapter: Path | None
    answer: "Answer"


def demo(tp: Annotated[int, typer.Option("--tp", min=1, help="TP degree: 1, 2 or 4.")] = 2) -> None:
    """Serve a small random model with four adapters, and check every token against PEFT. Its files go to ./.demo."""
    console = Console()
    started = time.monotonic()
    model, adapters, late = _make_files(console)
    requests = _serve(console, model, tp, adapters, late)
    with _progress(console, "Asking PEFT for the same answers"):
        equal = _equal_to_peft(model, requests)
    _print_results(console, requests, equal)
    verdict = f"{sum(equal)} of {len(equal)} answers equal PEFT's in each of {NEW_TOKENS} tokens."
    console.print(f"{verdict} {time.monotonic() - started:.0f} s in all.", style="green" if all(equal) else "bold red")
    if not all(equal):
        raise typer.Exit(1)


def _make_files(console: Console) -> tuple[Path, list[Path], Path]:
    """The model, the adapters to start with, and the one to load later."""
    missing = [name for name in ("sglang", "peft", "transformers", "requests") if find_spec(name) is None]
    if missing:
        extras = "pip install 'bdlora-sglang[serve,dev]'"
        raise BDLoRAError(f"bdlora demo: found no {', '.join(missing)}, expected the extras installed: {extras}")
    with _progress(console, f"Making a model and adapters in {FOLDER}"):
        from bdlora_perf.synthetic import make_adapter, make_model

        shutil.rmtree(FOLDER, ignore_errors=True)
        model = make_model(FOLDER / "model")
        folders = [
            make_adapter(FOLDER / "adapters" / name, model, rank=rank, nblocks=nblocks, seed=seed)
            for seed, (name, (rank, nblocks)) in enumerate(_ADAPTERS.items())
        ]
        late = make_adapter(FOLDER / "later" / _LATE_NAME, model, rank=_LATE[0], nblocks=_LATE[1], seed=len(folders))
    return model, folders, late


def _serve(console: Console, model: Path, tp: int, adapters: Sequence[Path], late: Path) -> list[Request]:
    """Start the server, send it requests and stop it."""
    from bdlora_cli.demo_server import running_server

    log = FOLDER / "server.log"

    def show_command(command: Sequence[str]) -> None:
        console.print(f"$ {' '.join(command)}", style="bold", highlight=False, soft_wrap=True)

    with running_server(model, tp, adapters[0].parent, log, show_command) as server:
        with _progress(console, f"Starting the server (its output: {log})"):
            server.wait_until_healthy()
        for line in server.start_report():
            console.print(Text(line), soft_wrap=True)
        with _progress(console, "Sending a mixed batch, a streamed request, loading and unloading"):
            return _send(server, adapters, late)


def _send(server: "DemoServer", adapters: Sequence[Path], late: Path) -> list[Request]:
    mixed: list[Path | None] = [*adapters, None]
    names = [None if adapter is None else adapter.name for adapter in mixed]
    answers = server.generate(names, PROMPT, _SAMPLING)
    requests = [Request("batch", *pair) for pair in zip(mixed, answers, strict=True)]

    streamed = server.stream(adapters[1].name, PROMPT, _SAMPLING)
    if streamed.pieces < 2:
        raise BDLoRAError("/generate: found a streamed answer in one piece, expected several")
    requests.append(Request("streamed", adapters[1], streamed))

    before = server.adapters()
    server.load(late.name, late)
    _expect_adapters(server, before | {late.name})
    requests += [Request("loaded", late, answer) for answer in server.generate([late.name], PROMPT, _SAMPLING)]
    server.unload(late.name)
    _expect_adapters(server, before)
    return requests


def _expect_adapters(server: "DemoServer", expected: set[str]) -> None:
    found = server.adapters()
    if found != expected:
        raise BDLoRAError(f"/v1/models: found adapters {sorted(found)}, expected {sorted(expected)}")


def _equal_to_peft(model: Path, requests: Sequence[Request]) -> list[bool]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from bdlora_perf.synthetic.reference import PeftReference

    logging.disable_progress_bar()
    prompt = AutoTokenizer.from_pretrained(model).encode(PROMPT)
    reference = PeftReference(model)
    return [
        request.answer.tokens == reference.generate(prompt, request.adapter, NEW_TOKENS).tokens for request in requests
    ]


def _print_results(console: Console, requests: Sequence[Request], equal: Sequence[bool]) -> None:
    from bdlora_sglang.adapter import Adapter

    table = Table(title=f"Answers to '{PROMPT}'", caption="The model's weights are random: its answers make no sense.")
    for column in ("request", "adapter", "kind"):
        table.add_column(column, no_wrap=True)
    for column in ("blocks", "rank"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("equals\nPEFT")
    for request, is_equal in zip(requests, equal, strict=True):
        if request.adapter is None:
            described = ["(none)", "base", "-", "-"]
        else:
            adapter = Adapter.open(request.adapter)
            described = [request.adapter.name, adapter.kind, str(adapter.nblocks), str(adapter.max_rank)]
        verdict = Text("yes", style="green") if is_equal else Text("NO", style="bold red")
        table.add_row(request.how, *described, Text(_shorten(request.answer.text.strip())), verdict)
    console.print(table)


def _progress(console: Console, what: str) -> Progress:
    """A spinner with the time; its line stays."""
    progress = Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console)
    progress.add_task(what, total=None)
    return progress


def _shorten(text: str, length: int = 18) -> str:
    """The start of ``text`` in one line. Random bytes are seldom whole characters: what is not ASCII becomes a dot."""
    plain = "".join(character if character.isascii() and character.isprintable() else "·" for character in text)
    return plain if len(plain) <= length else f"{plain[: length - 3]}..."
