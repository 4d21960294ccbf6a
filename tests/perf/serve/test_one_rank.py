"""One TP rank of a model as a model of its own: sizes as a rank of the whole has them; and the script for one GPU."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bdlora_perf.estimate.model_shape import load_shape
from bdlora_perf.serve.adapters import matched_adapter, one_rank_model, synthetic_model
from bdlora_perf.serve.options import ServeOptions
from bdlora_perf.serve.report import make_report
from bdlora_perf.serve.run import schedule
from bdlora_perf.serve.systems import SYSTEMS, AdapterShape
from bdlora_perf.serve.workload import Sweep
from bdlora_sglang.errors import BDLoRAError
from tests.perf.serve.test_refusals import refusal

PERF = Path(__file__).parents[3] / "perf"


def options(model: str, whole: str, num_ranks: int, systems: Sequence[str]) -> ServeOptions:
    return ServeOptions(
        model=model, tp=1, systems=[SYSTEMS[name] for name in systems], urls={}, workloads=Sweep().workloads(),
        rounds=3, bounds={}, keep_servers=False, dtype="bfloat16", server_flags=(), seed=0, work=Path(), command="",
        rounds_a_start=3, one_rank_of=num_ranks, whole_model=whole,
    )  # fmt: skip


def test_a_rank_holds_as_much_as_one_of_the_whole() -> None:
    whole = load_shape("llama-3.1-70b")
    own = whole.one_rank_of(8)
    assert (own.heads, own.kv_heads, own.head_dim, own.intermediate, own.vocabulary) == (8, 1, 128, 3584, 16032)
    assert own.weight_bytes(1) == whole.weight_bytes(8) and own.kv_bytes_per_token(1) == whole.kv_bytes_per_token(8)
    assert whole.one_rank_of(16).kv_heads == 1
    with pytest.raises(BDLoRAError, match="--tp: found 7 and heads of 64"):
        whole.one_rank_of(7)


def test_its_adapters_are_what_a_rank_of_the_whole_holds(tmp_path: Path) -> None:
    """By the sizes of PEFT's tensors: of BD-LoRA an N-th; of plain LoRA all but what tensor parallelism cuts."""
    whole, num_ranks, r = str(synthetic_model(tmp_path, 512, 1, seed=0)), 4, 8
    own = str(one_rank_model(tmp_path, load_shape(whole), num_ranks))
    assert str(one_rank_model(tmp_path, load_shape(whole), num_ranks)) == own
    found = options(own, whole, num_ranks, ())
    assert [found.shape(SYSTEMS[name], r) for name in ("base", "bd-2r", "bd-4r", "lora")] == [
        None,
        AdapterShape(4, 1),
        AdapterShape(8, 1),
        AdapterShape(8, None),
    ]
    ours, theirs = matched_adapter(tmp_path, own, AdapterShape(4, 1), 0), AdapterShape(16, num_ranks)
    assert num_ranks * ours.parameters == matched_adapter(tmp_path, whole, theirs, 0).parameters
    column = 3 * 512 + 2 * 512 + (512 + 2 * 512 + 2 * 1792) // num_ranks
    row = (512 + 1792) // num_ranks + 2 * 512
    assert matched_adapter(tmp_path, own, AdapterShape(r, None), 0).parameters == r * (column + row)


def test_whatever_it_generates_has_a_text(tmp_path: Path) -> None:
    """Else the client would not see the first token."""
    from transformers import AutoTokenizer

    model = one_rank_model(tmp_path, load_shape("llama-3.1-8b"), 8)
    assert not list(model.glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = tokenizer.batch_decode(torch.arange(16032).reshape(-1, 1), skip_special_tokens=True)
    assert len(set(texts)) == 16032 and all(texts)


def test_the_report_says_what_is_left_out() -> None:
    from bdlora_perf.report.run import Run
    from bdlora_perf.serve.options import Benchmark

    state = Benchmark(options("rank", "llama-3.1-70b", 8, ["base"]))
    report = make_report(state, Run("", 0))
    assert report.settings["one rank of"] == "llama-3.1-70b at TP 8, without collectives"
    assert report.settings["order of the systems"] == "as listed"
    assert "--load-format dummy" in str(report.systems["base"].details["flags"])


def test_servers_started_once_run_all_rounds_in_the_order_given() -> None:
    points = Sweep(concurrency=(1, 2)).workloads()
    batches = schedule(["c", "a", "b"], points, 3, False, 0, rounds_a_start=3)
    assert [{turn.system for turn in batch} for batch in batches] == [{"c"}, {"a"}, {"b"}]
    assert [(t.round, t.workload.concurrency) for t in batches[0]] == [(r, c) for r in (1, 2, 3) for c in (1, 2)]
    batches = schedule(["c", "a", "b"], points, 3, False, 0, rounds_a_start=2)
    assert [{turn.round for turn in batch} for batch in batches] == [{1, 2}] * 3 + [{3}] * 3


def test_waves() -> None:
    assert [w.num_prompts for w in Sweep(concurrency=(1, 32), waves=2).workloads()] == [2, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "2"], "--one-rank-of 2: found --tp or --url"),
        (["--systems", "lora-fully-sharded"], "--one-rank-of: found 'lora-fully-sharded'"),
        (["--systems", "base", "--model", "llama-3.1-8b", "--one-rank-of", "5"], "--tp: found 5 and heads of 32"),
    ],
    ids=["tp", "fully-sharded", "not-even"],
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    words = ["--one-rank-of", "2", "--layers", "1", *arguments]
    assert message in refusal(*words, "--output", tmp_path / "report", "--work", tmp_path / "work")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_script_gives_flags_that_the_command_takes(tmp_path: Path) -> None:
    """All but the GPU is there: the first thing that the command misses is a GPU for SGLang's own kernels."""
    script = (PERF / "measure_engine_on_gpu.sh").read_text()
    (command,) = re.findall(r"perf serve (.*?) --output", script.replace("\\\n", ""), re.DOTALL)
    found = refusal(*shlex.split(command), "--output", tmp_path / "report", "--work", tmp_path / "work")
    assert found == "--systems: found 'sglang-triton-v2', which needs a GPU, expected systems that run on a CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.parametrize("script", ["measure_engine_on_gpu.sh", "try_engine_on_gpu.sh"])
def test_the_scripts_say_what_is_missing(script: str, tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('no sgl_kernel')\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        ["sh", PERF / script, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 103, done.stderr
    assert "sglang: found ImportError (no sgl_kernel), expected what pip install" in done.stdout
