"""Bytes, times and the order of the turns."""

from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import groupby
from pathlib import Path
from threading import Thread

import pytest
from safetensors import safe_open

from bdlora_perf.engine.bandwidth import shape_of, step_bytes
from bdlora_perf.engine.batch import Arrival, Prompts, StepTimes, measure_steps, step_times
from bdlora_perf.engine.beside import turns
from bdlora_perf.engine.measure import bandwidth_gbs
from bdlora_perf.engine.plan import CONTENDERS
from bdlora_perf.serve.servers import rank_cores
from bdlora_perf.synthetic import make_model
from bdlora_sglang.errors import BDLoRAError


def elements(path: Path, wanted: str) -> int:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if wanted in name and name.endswith(".weight")]  # noqa: SIM118
        return sum(file.get_tensor(name).numel() for name in names)


@pytest.mark.parametrize(
    ("architecture", "head"), [("llama", "lm_head"), ("qwen2", "lm_head"), ("gemma", "embed_tokens")]
)
def test_bytes_of_a_step_are_the_weights_in_the_file(architecture: str, head: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture)
    shape = shape_of(str(folder))
    weights = elements(folder, "_proj") + elements(folder, head)
    assert step_bytes(shape, 1, 4) == 4 * weights
    assert step_bytes(shape, 4, 2) == 2 * weights


def test_kv_heads_that_ranks_share_are_read_by_each(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=2)
    copied = elements(folder, "k_proj") + elements(folder, "v_proj")
    shape = shape_of(str(folder))
    assert step_bytes(shape, 2, 4) == step_bytes(shape, 1, 4)
    assert step_bytes(shape, 4, 4) == step_bytes(shape, 1, 4) + 4 * copied


FIRSTS = [Arrival(0.4, 1, 1), Arrival(0.5, 0, 1)]
LASTS = [Arrival(2.4, 0, 9), Arrival(2.5, 1, 9)]


def test_times_by_hand() -> None:
    """A prefill in parts, its requests out of order."""
    times = step_times([*FIRSTS, *LASTS], 2, 8)
    assert times == StepTimes(prefill_ms=500, decode_ms=250)
    assert bandwidth_gbs(3e9, times.decode_ms) == 12


@pytest.mark.parametrize(
    "arrivals",
    [
        FIRSTS,
        [*FIRSTS, *LASTS[:1]],
        [*FIRSTS, Arrival(1, 0, 5), *LASTS],
        [*FIRSTS, *LASTS, Arrival(3, 2, 9)],
        [*FIRSTS, LASTS[0], Arrival(2.5, 1, 8)],
    ],
    ids=["no-end", "one-end", "in-between", "another", "short"],
)
def test_other_answers_are_no_measurement(arrivals: list[Arrival]) -> None:
    with pytest.raises(BDLoRAError, match=r"expected the first and the last of 9 tokens for each of 2 requests"):
        step_times(arrivals, 2, 8)


class _BreaksOff(BaseHTTPRequestHandler):
    """The first token of a stream, and no more."""

    def do_POST(self) -> None:
        line = b'data: {"index": 0, "meta_info": {"completion_tokens": 1}}\n\n'
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(line)))
        self.end_headers()
        self.wfile.write(line)


def test_a_server_that_dies_in_mid_stream_is_an_error_of_its_own() -> None:
    with HTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
        Thread(target=server.handle_request).start()
        with pytest.raises(BDLoRAError, match=r"found no end of an answer \(ChunkedEncodingError\), expected one"):
            measure_steps(f"http://127.0.0.1:{server.server_port}", [[3, 4]], [], 8)


def test_no_prompt_comes_twice() -> None:
    prompts = Prompts(vocabulary=512, length=4, seed=1)
    taken = [tuple(prompt) for _ in range(50) for prompt in prompts.take(8)]
    assert len(set(taken)) == len(taken) == 400
    assert all(len(prompt) == 4 and min(prompt) >= 3 and max(prompt) < 512 for prompt in taken)
    assert Prompts(512, 4, 1).take(2) == [list(prompt) for prompt in taken[:2]]


def test_each_system_goes_first_as_often_as_the_others() -> None:
    found = list(turns(CONTENDERS, [1, 8], 4))
    assert len(found) == len(set(found)) == 4 * 2 * 4
    names = ["base", "bd-2r", "base-before", "bd-2r-before"]
    first = Counter[str]()
    for _, neighbours in groupby(found, key=lambda turn: (turn.round, turn.size)):
        order = [turn.contender.name for turn in neighbours]
        assert sorted(order) == sorted(names)
        first[order[0]] += 1
    assert first == dict.fromkeys(names, 2)


def test_cores_are_those_that_the_log_tells() -> None:
    line = "[2026-01-02 03:04:05 TP{}] This rank runs on {}."
    log = "\n".join(["starting", line.format(1, "cores 4-6, 3 threads"), line.format(0, "cores 0-2,9, 4 threads")])
    assert rank_cores(log) == "rank 0: cores 0-2,9, 4 threads; rank 1: cores 4-6, 3 threads"
    assert rank_cores("[2026-01-02 03:04:05] This rank runs on any core, 1 thread.") == "rank 0: any core, 1 thread"
    assert rank_cores("nothing") == ""
