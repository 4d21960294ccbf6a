"""The examples in a short form, on a small model; then all the adapters that they made are served together."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from bdlora_perf.server_process import free_port
from bdlora_perf.synthetic import make_model
from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import BDLoRAError
from examples.convert_and_heal.convert import main as convert
from examples.serve import main as serve
from examples.shared.data import OPPOSITES, read_rows
from examples.shared.training import lora_config
from examples.train_and_serve.train import main as train
from examples.train_under_tp.shards import local_config, take_shards

ROOT = Path(__file__).resolve().parents[2]
TP = 2
LAYERS = 2
ADAPTERS = ("trained", "lora", "lossless", "truncated", "healed", "under-tp")


@dataclass(frozen=True)
class Ran:
    """The model, the folder of the adapters, and what each example printed."""

    model: Path
    adapters: Path
    printed: dict[str, str]

    def rows(self, example: str) -> dict[str, list[str]]:
        """The cells of the tables' rows, by the first."""
        lines = [line.split("│")[1:-1] for line in self.printed[example].splitlines() if line.startswith("│")]
        return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def run(*arguments: str | Path) -> str:
    """What ``python -m arguments...`` prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def call(main: Callable[..., None], **options: Any) -> str:
    """What an example of one process prints; in this process, which has imported PEFT and transformers."""
    with redirect_stdout(io.StringIO()) as printed:
        main(**options)
    return printed.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    model = make_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=LAYERS)
    adapters = tmp_path_factory.mktemp("adapters")
    torchrun = ("torch.distributed.run", f"--nproc-per-node={TP}", f"--master-port={free_port()}", "-m")
    under_tp = ("examples.train_under_tp.train", "--steps=10", "--model", model, "--output", adapters / "under-tp")
    printed = {
        "train": call(train, model=str(model), steps=16, output=adapters / "trained"),
        "convert": call(convert, model=str(model), steps=16, output=adapters),
        "under-tp": run(*torchrun, *under_tp),
    }
    return Ran(model, adapters, printed)


def test_bd_lora_for_a_tp_degree(ran: Ran) -> None:
    adapter = Adapter.open(ran.adapters / "trained")
    assert (adapter.kind, adapter.nblocks, adapter.max_rank) == ("BD-LoRA", TP, 8)
    first, last = map(float, re.findall(r"Loss ([\d.]+) -> ([\d.]+)", ran.printed["train"])[0])
    assert last < first / 4


def test_healing_brings_back_what_conversion_cost(ran: Ran) -> None:
    rows = ran.rows("convert")
    loss = {name: float(rows[name][-1]) for name in ("lora", "lossless", "truncated", "healed")}
    assert loss["lossless"] == loss["lora"] < loss["truncated"]
    assert loss["healed"] < loss["truncated"]
    assert (
        Adapter.open(ran.adapters / "healed").num_parameters == Adapter.open(ran.adapters / "truncated").num_parameters
    )


def test_no_collective_for_lora_in_training(ran: Ran) -> None:
    """The base model's: a row-parallel layer's in the forward, a column-parallel one's in the backward, the head's."""
    rows = ran.rows("under-tp")
    forward, backward = 2 * LAYERS + 1, 5 * LAYERS + 1
    expected = {
        "base model": [forward, backward, 0],
        "BD-LoRA, a block a rank": [forward, backward, 0],
        "plain LoRA by PEFT": [forward + 2 * LAYERS, backward + 5 * LAYERS, 7 * LAYERS],
    }
    assert {label: [int(cell) for cell in rows[label]] for label in expected} == expected


def test_training_under_tp_equals_one_process(ran: Ran) -> None:
    """The same from the same start by PEFT's BD-LoRA on the whole model, in float32."""
    (found,) = re.findall(r"difference of a loss: (\S+)\. Weights: (\S+) of", ran.printed["under-tp"])
    loss, weights = map(float, found)
    assert loss < 1e-3 and weights < 1e-3


def test_every_adapter_is_served_as_peft_computes_it(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    folders = [ran.adapters / name for name in ADAPTERS]
    monkeypatch.setenv("COLUMNS", "400")  # a table that is not wrapped
    ran.printed["serve"] = call(serve, folders=folders, model=str(ran.model), tp=TP, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(ran.model)
    reference = PeftReference(ran.model)
    prompts = [tokenizer.encode(row.prompt) for row in read_rows(OPPOSITES)[:3]]

    def answers(folder: Path | None) -> list[str]:
        generated = (reference.generate(prompt, folder, 6).tokens for prompt in prompts)
        return [
            ascii(tokenizer.decode(list(takewhile(tokenizer.eos_token_id.__ne__, tokens)), skip_special_tokens=True))
            for tokens in generated
        ]

    rows = ran.rows("serve")
    assert rows["base model"] == answers(None)
    assert {folder.name: rows[folder.name] for folder in folders} == {
        folder.name: answers(folder) for folder in folders
    }


def test_bad_data(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(BDLoRAError, match=r"data\.jsonl, line 2: found .*expected"):
        read_rows(data)


def test_what_cannot_be_trained_under_tp(ran: Ran) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(BDLoRAError, match=r"layers\.0\.self_attn\.q_proj: found weights placed as whole"):
        take_shards(AutoModelForCausalLM.from_pretrained(ran.model), ["q_proj"])
    with pytest.raises(BDLoRAError, match="--rank: found 6, expected a multiple of 4 ranks"):
        local_config(lora_config(6, 2, str(ran.model)), 4)
