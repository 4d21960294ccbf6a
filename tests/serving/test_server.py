"""SGLang's interfaces on a running ``bdlora launch``: all of them keep working, with more adapters than slots."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from bdlora_perf.reference import PeftReference
from tests.serving.server import Server, running_server
from tests.serving.zoo import ADAPTERS, PROMPTS, Zoo

NEW_TOKENS = 6
TP = 2
SLOTS = 4
COMMON_FLAGS = ("--dtype", "float32", "--max-running-requests", 16, "--chunked-prefill-size", 32)


class Served:
    """A server at TP 2 with all adapters of the zoo on four slots, and PEFT's answers."""

    def __init__(self, server: Server, model: Path, adapters: dict[str, Path]) -> None:
        self.server, self.model, self.adapters = server, model, adapters
        self._reference = PeftReference(model)
        self._expected: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
        self._lock = threading.Lock()

    def expected(self, adapter: Path | None, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        key = (str(adapter), tuple(prompt), new_tokens)
        with self._lock:
            if key not in self._expected:
                self._expected[key] = self._reference.generate(prompt, adapter, new_tokens).tokens
            return self._expected[key]

    def check(self, names: list[str | None], prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> None:
        answers = self.server.generate(names, prompts, new_tokens)
        for name, prompt, tokens in zip(names, prompts, answers, strict=True):
            assert tokens == self.expected(self.adapters.get(name or ""), prompt, new_tokens), name

    def load(self, name: str, path: Path, **options: Any) -> requests.Response:
        return self.server.post("/load_lora_adapter", lora_name=name, lora_path=str(path), **options)

    def unload(self, name: str) -> requests.Response:
        return self.server.post("/unload_lora_adapter", lora_name=name)


@pytest.fixture(scope="module")
def served(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = zoo.model("llama")
    adapters = zoo.adapters(model)
    # Nothing but the adapters in the folder that --adapters names.
    folder = tmp_path_factory.mktemp("adapters")
    for name, path in adapters.items():
        shutil.copytree(path, folder / name)
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--tp", TP, "--adapters", folder, "--max-loras-per-batch", SLOTS, "--enable-metrics", *COMMON_FLAGS)
    with running_server(model, log, *flags) as server:
        yield Served(server, model, {name: folder / name for name in adapters})


def test_the_start_prints_what_is_served(served: Served) -> None:
    log = served.server.log_text()
    assert "No GPU here" in log or torch.cuda.is_available()
    assert "BD-LoRA is in place: 12 layers" in log
    assert all(name in log for name in ADAPTERS)


def test_mixed_batch(served: Served) -> None:
    names: list[str | None] = [None, "bd2-r8", "plain-r16", "bd4-r8", None, "bd2-r8"]
    served.check(names, [PROMPTS[i % len(PROMPTS)] for i in range(len(names))])


def test_more_adapters_than_slots(served: Served) -> None:
    """Every adapter twice, each request on its own, so that adapters evict each other all the time."""
    names = [None, *ADAPTERS] * 2
    random.Random(3).shuffle(names)
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda name: served.check([name], [PROMPTS[0]]), names))


def test_streaming(served: Served) -> None:
    response = requests.post(
        served.server.url + "/generate",
        json={
            "input_ids": PROMPTS[0],
            "lora_path": "bd4-r8",
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        },
        stream=True,
        timeout=60,
    )
    events = [line[len(b"data: ") :] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    assert len(events) > 2, "the answer came in one piece"
    assert json.loads(events[-2])["output_ids"][-NEW_TOKENS:] == served.expected(served.adapters["bd4-r8"], PROMPTS[0])


def test_text_completions_and_chat(served: Served) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.model)
    prompt = "the quick brown fox"
    expected = served.expected(served.adapters["bd8-r16"], tokenizer.encode(prompt))
    native = served.server.post(
        "/generate",
        text=prompt,
        lora_path="bd8-r16",
        sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    ).json()
    assert native["output_ids"] == expected
    # SGLang's way to name an adapter in OpenAI's API: base model, colon, adapter.
    body = {"model": "base:bd8-r16", "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    completion = served.server.post("/v1/completions", prompt=prompt, **body).json()
    assert completion["choices"][0]["text"] == native["text"]

    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    chat = served.server.post("/v1/chat/completions", messages=messages, **body).json()
    expected_text = tokenizer.decode(served.expected(served.adapters["bd8-r16"], list(ids)), skip_special_tokens=True)
    assert chat["choices"][0]["message"]["content"] == expected_text


def test_models_lists_the_adapters(served: Served) -> None:
    assert set(ADAPTERS) <= served.server.adapters()


def test_metrics_are_there(served: Served) -> None:
    assert "sglang:" in served.server.get("/metrics").text


def test_load_use_and_unload(served: Served) -> None:
    path = served.adapters["bd4-r8"]
    assert served.load("loaded", path).status_code == 200
    assert "loaded" in served.server.adapters()
    assert served.server.generate(["loaded"], [PROMPTS[2]], NEW_TOKENS) == [served.expected(path, PROMPTS[2])]
    assert served.unload("loaded").status_code == 200
    assert "loaded" not in served.server.adapters()
    # SGLang loads an adapter that it knows again by itself; one that it never saw is refused.
    assert served.server.generate(["loaded"], [PROMPTS[0]], NEW_TOKENS) == [served.expected(path, PROMPTS[0])]
    assert served.unload("loaded").status_code == 200
    refused = served.server.post("/generate", input_ids=PROMPTS[0], lora_path="never-loaded")
    assert refused.status_code == 400
    assert "never-loaded" in refused.text


def test_a_new_adapter_under_an_old_name(served: Served) -> None:
    """The radix cache must not answer with the prefix that the old adapter computed."""
    for adapter in ("bd4-r8", "plain-r16"):
        assert served.load("reused", served.adapters[adapter]).status_code == 200
        expected = served.expected(served.adapters[adapter], PROMPTS[2])
        assert served.server.generate(["reused"], [PROMPTS[2]], NEW_TOKENS) == [expected]
        assert served.unload("reused").status_code == 200


def test_pinned_adapter_survives_eviction(served: Served) -> None:
    path = served.adapters["bd2-r8"]
    assert served.load("pinned", path, pinned=True).status_code == 200
    for name in ADAPTERS:
        served.check([name], [PROMPTS[1]])
    assert served.server.generate(["pinned"], [PROMPTS[1]], NEW_TOKENS) == [served.expected(path, PROMPTS[1])]
    assert served.unload("pinned").status_code == 200


def test_pinned_adapters_may_not_take_all_slots(served: Served) -> None:
    path = served.adapters["bd2-r8"]
    for index in range(SLOTS - 1):
        assert served.load(f"pinned{index}", path, pinned=True).status_code == 200
    refused = served.load("one-too-many", path, pinned=True)
    assert refused.status_code == 400
    assert "pin" in refused.text
    # One slot is left for all others.
    for name in ("bd4-r8", None, "plain-r16", None):
        served.check([name], [PROMPTS[2]])
    for index in range(SLOTS - 1):
        assert served.unload(f"pinned{index}").status_code == 200


def test_an_adapter_from_bdlora_convert(served: Served, tmp_path: Path) -> None:
    """Losslessly converted to four blocks, it answers as the adapter that it was made of."""
    from bdlora_sglang.convert import ConvertOptions, lora2bd

    source = served.adapters["plain-r4-qv"]
    lora2bd(source, tmp_path / "converted", ConvertOptions(nblocks=4))
    assert served.load("converted", tmp_path / "converted").status_code == 200
    answers = served.server.generate(["converted"] * len(PROMPTS), list(PROMPTS), NEW_TOKENS)
    assert answers == [served.expected(source, prompt) for prompt in PROMPTS]
    assert served.unload("converted").status_code == 200


def test_radix_cache_is_used_and_keeps_adapters_apart(served: Served) -> None:
    prompt = list(range(150, 190))
    cached = []
    for name in ("bd2-r8", "bd4-r8", "bd2-r8", None):
        answer = served.server.post(
            "/generate",
            input_ids=prompt,
            lora_path=name,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        ).json()
        assert answer["output_ids"] == served.expected(served.adapters.get(name or ""), prompt), name
        cached.append(answer["meta_info"]["cached_tokens"])
    assert cached[0] == cached[1] == cached[3] == 0
    assert cached[2] > 30


def test_chunked_prefill(served: Served) -> None:
    """Prompts of several chunks (32 tokens each), with different adapters, at once."""
    prompts = [[(7 * i + 3 * j) % 480 + 16 for j in range(110)] for i in range(3)]
    served.check(["bd3-r12", None, "bd4-patterns-rslora"], prompts)


# --- what the server refuses ------------------------------------------------------------------------------------------


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: edit(name, tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _rename_layer(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.2.", "layers.7."): tensor for name, tensor in load_file(path).items()}, path)


def _add_output_head(folder: Path) -> None:
    _edit_config(folder, target_modules=["lm_head"], use_bdlora=None)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    save_file(
        dict(zip(names, (torch.ones(8, 96), torch.ones(512, 8)), strict=True)), folder / "adapter_model.safetensors"
    )


def _wrong_width(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :-4] if "layers.1.mlp.up_proj.lora_A" in name else tensor


REFUSALS = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json", "no such file"]),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        ["adapter_model.bin", "pickle"],
    ),
    "truncated": (_truncate, ["adapter_model.safetensors", "whole safetensors file"]),
    "type": (lambda folder: _edit_config(folder, peft_type="IA3"), ["peft_type", "IA3", "LORA"]),
    "dora": (lambda folder: _edit_config(folder, use_dora=True), ["use_dora", "DoRA"]),
    "blocks": (
        lambda folder: _edit_config(folder, use_bdlora={**_BD_FIELDS, "nblocks": 3}),
        ["nblocks = 3", "found 8"],
    ),
    "shape": (lambda folder: _edit_config(folder, r=16, rank_pattern={}), ["lora_A.weight", "(16, *)"]),
    "nan": (
        lambda folder: _edit_tensors(
            folder, lambda name, tensor: tensor * float("nan") if "q_proj" in name else tensor
        ),
        ["q_proj", "NaN"],
    ),
    "other base model": (lambda folder: _edit_tensors(folder, _wrong_width), ["up_proj.lora_A", "found 92", "96"]),
    "output head": (_add_output_head, ["lm_head", "q_proj"]),
    "added tokens": (
        lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 512}'),
        ["add tokens to the vocabulary"],
    ),
    "unknown module": (_rename_layer, ["layers.7.", "layers 0 to 2"]),
}
_BD_FIELDS = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}


@pytest.mark.parametrize("damage", REFUSALS)
def test_refusals_name_what_is_wrong_and_change_nothing(served: Served, tmp_path: Path, damage: str) -> None:
    edit, words = REFUSALS[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(served.adapters["bd4-r8"], folder)
    edit(folder)
    before = served.server.adapters()
    response = served.load("damaged", folder)
    assert response.status_code == 400
    for word in words:
        assert word in response.json()["error_message"], response.text
    assert served.server.adapters() == before
    served.check(["bd4-r8", None], [PROMPTS[0], PROMPTS[0]])


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("a/b", None, ["'a/b'", "path separators"]),
        ("bd2-r8", None, ["bd2-r8", "already loaded"]),
        ("missing", "no/such/adapter", ["no/such/adapter"]),
        ("too-large", {"rank": 48}, ["local rank 48", "--max-local-rank 48"]),
    ],
    ids=["separator", "duplicate", "missing", "too large"],
)
def test_refused_loads(served: Served, zoo: Zoo, name: str, path: Any, words: list[str]) -> None:
    if isinstance(path, dict):
        path = zoo.adapter(served.model, "too-large", seed=77, **path)
    response = served.load(name, path or served.adapters["bd2-r8"])
    assert response.status_code == 400
    for word in words:
        assert word in response.text
    served.check(["bd2-r8"], [PROMPTS[0]])


def test_an_adapter_that_fails_on_one_rank_fails_on_all(served: Served, tmp_path: Path) -> None:
    """Infinity in rank 1's block alone; requests in flight are answered right, and the repaired adapter loads."""
    folder = tmp_path / "half-broken"
    shutil.copytree(served.adapters["bd2-r8"], folder)

    def spoil_last_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layers.2.mlp.gate_proj.lora_B" in name:
            tensor[-1] = float("inf")
        return tensor

    _edit_tensors(folder, spoil_last_row)
    with ThreadPoolExecutor(4) as clients:
        in_flight = [clients.submit(served.check, ["bd4-r8", None], [PROMPTS[2]] * 2, 40) for _ in range(4)]
        response = served.load("half-broken", folder)
        for request in in_flight:
            request.result()
    assert response.status_code == 400
    message = response.json()["error_message"]
    assert message.startswith("TP rank 1:") and "layers.2.mlp.gate_proj.lora_B" in message
    assert "half-broken" not in served.server.adapters()
    shutil.copy(served.adapters["bd2-r8"] / "adapter_model.safetensors", folder)
    assert served.load("half-broken", folder).status_code == 200
    expected = served.expected(served.adapters["bd2-r8"], PROMPTS[0])
    assert served.server.generate(["half-broken"], [PROMPTS[0]], NEW_TOKENS) == [expected]
    assert served.unload("half-broken").status_code == 200


def test_random_loads_uses_and_unloads(served: Served) -> None:
    """Several clients for a while (BDLORA_STRESS_SECONDS): every answer right, memory flat."""
    seconds = float(os.environ.get("BDLORA_STRESS_SECONDS", "30"))
    paths = list(served.adapters.values())
    for path in paths:
        served.expected(path, PROMPTS[0])  # PEFT is asked before the clock starts
    memory: list[list[int]] = []
    count = [0]

    def client(index: int, stop_at: float) -> None:
        rng = random.Random(index)
        turn = 0
        while time.monotonic() < stop_at:
            path, name = rng.choice(paths), f"client{index}-{turn}"
            turn += 1
            assert served.load(name, path).status_code == 200
            for _ in range(rng.randint(1, 3)):
                names = [name, rng.choice([None, *served.adapters])]
                first, second = served.server.generate(names, [PROMPTS[0]] * 2, NEW_TOKENS)
                assert first == served.expected(path, PROMPTS[0])
                assert second == served.expected(served.adapters.get(names[1] or ""), PROMPTS[0])
                count[0] += 2
            assert served.unload(name).status_code == 200

    for part in (0.3, 0.7):
        with ThreadPoolExecutor(4) as clients:
            stop_at = time.monotonic() + part * seconds
            for running in [clients.submit(client, index, stop_at) for index in range(4)]:
                running.result()
        memory.append(served.server.scheduler_memory())
    print(f"{count[0]} answers, scheduler memory after warm-up and at the end: {memory}")
    assert count[0] > 10
    assert len(memory[0]) == TP
    for before, after in zip(*memory, strict=True):
        assert after < before * 1.05 + (8 << 20), f"memory grew: {memory}"
