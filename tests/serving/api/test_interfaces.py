"""SGLang's interfaces on a running ``bdlora launch``: all of them keep working, with more adapters than slots."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch

from tests.serving.api.served import NEW_TOKENS, SLOTS, Served
from tests.serving.zoo import ADAPTERS, PROMPTS


def test_the_start_prints_what_is_served(served: Served) -> None:
    log = "\n".join(served.server.log_lines())
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
    for unknown in ("loaded", "never-loaded"):
        refused = served.server.post("/generate", input_ids=PROMPTS[0], lora_path=unknown)
        assert refused.status_code == 404
        assert unknown in refused.text


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
    lora2bd(source, tmp_path / "converted", ConvertOptions(nblocks=4), lossless=True)
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
