"""Requests that would end SGLang's scheduler, or be answered otherwise than they are meant: each is refused by name."""

import itertools
from typing import Any

import pytest

from tests.serving.api.served import NEW_TOKENS, Served
from tests.serving.zoo import PROMPTS

NO_ADAPTER = {"input_ids": PROMPTS[0]}

# By the field that the answer must name.
WRONG: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": ""}, {"text": []}, {"text": ["a", ""]}],
    "input_ids": [
        *({"input_ids": ids} for ids in ([], [[]], [[1], []], [-1], [10**6], [[1], [10**6]], [2**63 - 1], [[1], 2])),
        {"text": "a", "input_ids": [[1]]},
        {"text": ["a"], "input_ids": [1]},
    ],
    "lora_path": [
        {"text": "a", "lora_path": ["bd2-r8"]},
        {"text": ["a"], "lora_path": ["bd2-r8", "bd4-r8"]},
        {"text": ["a", "b"], "lora_path": ["bd2-r8"]},
        {"text": ["a"], "lora_path": [["bd2-r8"]]},
        {"text": "a", "lora_path": 3},
        {"text": "a", "lora_path": "nope"},
        {"text": ["a", "b"], "lora_path": [None, "nope"]},
    ],
    "lora_id": [{**NO_ADAPTER, "lora_id": "x"}, {"text": ["a"], "lora_id": ["x"]}],
    "rid": [{**NO_ADAPTER, "rid": "HEALTH_CHECK_x"}, {"text": ["a", "b"], "rid": ["x"]}, {**NO_ADAPTER, "rid": ["x"]}],
    "top_logprobs_num": [
        {**NO_ADAPTER, "return_logprob": True, "top_logprobs_num": n} for n in (-1, 513, 10**6, 2**40)
    ],
    "token_ids_logprob": [{**NO_ADAPTER, "return_logprob": True, "token_ids_logprob": ids} for ids in ([-1], [10**6])],
    "logprob_start_len": [
        {**NO_ADAPTER, "return_logprob": True, "logprob_start_len": n} for n in (-2, -(2**40), 10**6)
    ],
    "image_data": [{**NO_ADAPTER, "image_data": "x.png"}, {"text": ["a", "b"], "image_data": ["x.png", "y.png"]}],
    "audio_data": [{**NO_ADAPTER, "audio_data": ["x.wav"]}],
    "sampling_params": [{"text": ["a", "b"], "sampling_params": p} for p in ([], [{}], [{}] * 3)],
    "input_embeds": [{"input_embeds": e} for e in ([], [[]], [[0.5]], [[[0.5]]], [[0.5] * 96, [0.5]])],
    "positional_embed_overrides": [{**NO_ADAPTER, "positional_embed_overrides": {"embeds": [], "positions": []}}],
    "token_indices_to_pool": [{**NO_ADAPTER, "token_indices_to_pool": [10**6]}],
    "bootstrap_room": [{**NO_ADAPTER, "bootstrap_room": n} for n in (-1, 2**63)],
    "session_params": [
        {**NO_ADAPTER, "session_params": p} for p in ({"id": 3}, {"nope": 1}, {"id": "x", "offset": "y"})
    ],
    "custom_labels": [{**NO_ADAPTER, "custom_labels": {"x": "y"}}],
    "return_routed_experts": [{**NO_ADAPTER, "return_routed_experts": True}],
    "http_worker_ipc": [{**NO_ADAPTER, "http_worker_ipc": "ipc:///nowhere"}],
}

WRONG_SAMPLING: dict[str, list[Any]] = {
    "temperature": [-1, "hot", 1e39, [0.5]],
    "top_p": [0, 1.5, -1, "x"],
    "top_k": [-2, 0, 2**31, 2**70, 1.5],
    "min_p": [-1, 2, "x"],
    "frequency_penalty": [3, "x"],
    "presence_penalty": [-3],
    "repetition_penalty": [0, 1e-300, -1, 3],
    "max_new_tokens": [-1, 2**40, "x", 1.5],
    "min_new_tokens": [-1, 10**6],
    "n": [0, -1, 10**9, "x", 1.5],
    "beam_width": [0, -1, 10**9],
    "logit_bias": [{"x": 1}, {"-1": 1}, {"1000000": 1}, {"5": 1e300}, {"5": "x"}, {"1_0": 1}, [1]],
    "stop_token_ids": [[-1], [10**6], ["x"], 5, [2**40]],
    "stop": [[""], 5, [5], [["a"]], ["x"] * 100],
    "stop_regex": ["(", "(a+)+$", "(a|aa)+$", "a?" * 60 + "a" * 60, r"(a)\1", ["a"] * 33, "a" * 257, 5],
    "stream_interval": [0, -1],
    "sampling_seed": [2**63, "x"],
    "custom_params": [{"a": [[1]]}, 5],
    "is_normalized": [True],
    "nope": [1],
}


def _cases() -> list[Any]:
    fields = ((field, body) for field, bodies in WRONG.items() for body in bodies)
    sampling = (
        (name, {**NO_ADAPTER, "sampling_params": {name: value}})
        for name, values in WRONG_SAMPLING.items()
        for value in values
    )
    return list(itertools.chain(fields, sampling))


def test_wrong_requests_are_refused_by_the_name_of_the_field(served: Served) -> None:
    """One after the other, in the middle of good ones, then all over again as streams and for an adapter."""
    before = served.server.adapters()
    unexpected = []
    for index, (field, body) in enumerate(_cases()):
        for more in ({}, {"stream": True}):
            answer = served.server.post("/generate", **body, **more)
            if not (400 <= answer.status_code < 500 and field in answer.text):
                unexpected.append((field, body, answer.status_code, answer.text[:200]))
        if index % 20 == 0:
            served.check(["bd2-r8", None], [PROMPTS[0], PROMPTS[1]])
    assert unexpected == []
    served.check(["bd2-r8", None, "bd4-r8"], [PROMPTS[0]] * 3)
    assert served.server.adapters() == before
    # None is counted as used any more: each could be unloaded.
    for name in ("bd2-r8", "bd4-r8"):
        assert served.unload(name).status_code == 200
        assert served.load(name, served.adapters[name]).status_code == 200


@pytest.mark.parametrize(
    "grammar", [{"ebnf": "root ::= root"}, {"json_schema": '{"$ref": "#"}'}, {"regex": "[^\\x00-\\U0010ffff]"}]
)
def test_a_grammar_without_an_answer(served: Served, grammar: dict[str, str]) -> None:
    for drawn in ({"temperature": 0}, {"temperature": 1}, {"top_k": 5, "top_p": 0.5}, {"min_p": 0.1}):
        sampling = {**drawn, "max_new_tokens": NEW_TOKENS, **grammar}
        assert served.server.post("/generate", **NO_ADAPTER, sampling_params=sampling).status_code in {200, 400}
    served.check(["bd2-r8", None], [PROMPTS[0], PROMPTS[1]])


def test_beams_beside_an_adapter(served: Served) -> None:
    """A beam search has more rows in a batch than requests, all of the base model; for an adapter SGLang refuses it."""
    greedy = {"temperature": 0, "max_new_tokens": 3 * NEW_TOKENS, "ignore_eos": True}
    beams = {"max_new_tokens": NEW_TOKENS, "beam_width": 4, "ignore_eos": True}
    both = {"input_ids": [PROMPTS[0], PROMPTS[0]], "lora_path": ["bd2-r8", None], "sampling_params": [greedy, beams]}
    answer = served.server.post("/generate", **both)
    assert answer.status_code == 200, answer.text
    expected = served.expected(served.adapters["bd2-r8"], PROMPTS[0], 3 * NEW_TOKENS)
    assert answer.json()[0]["output_ids"] == expected
    refused = served.server.post("/generate", input_ids=PROMPTS[0], lora_path="bd2-r8", sampling_params=beams)
    assert refused.status_code == 400 and "LoRA" in refused.text
    served.check(["bd2-r8", None], [PROMPTS[0], PROMPTS[1]])


def test_odd_bodies_of_other_apis(served: Served) -> None:
    """Each was called the server's fault: SGLang's validators, its streams and its chat templates trip over them."""
    chat: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "a"}]}
    odd: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**chat, "response_format": [[{}]]}),
        ("/api/chat", {"model": "base", "messages": []}),
        ("/api/generate", {"model": "base", "prompt": "a", "options": {"top_p": 1e39}}),
        ("/api/generate", {"model": "base", "prompt": "a", "stream": False, "options": {"top_p": 1e39}}),
        ("/v1/completions", {"model": "base", "prompt": "a", "logprobs": 1024}),
    ]
    for path, body in odd:
        assert served.server.post(path, **body).status_code == 400, (path, body)
    right: list[tuple[str, dict[str, Any]]] = [
        ("/api/chat", {**chat, "stream": False}),
        ("/generate", {"text": ["a"], "audio_data": []}),
        ("/generate", {"text": ["a", "b"], "modalities": ["image"]}),
        ("/generate", {"text": "a", "modalities": ["image"], "sampling_params": {"n": 2}}),
    ]
    for path, body in right:
        assert served.server.post(path, **body).status_code == 200, (path, body)


def test_a_key_of_a_client_does_not_reach_the_prefixes_of_an_adapter(served: Served) -> None:
    """Whatever the extra key: SGLang appends the adapter's id to it, and nothing for the base model."""
    name = "bd2-r8"
    prompt = list(range(200, 240))
    served.check([name], [prompt])
    info = served.server.get("/server_info").json()
    [adapter_id] = [ref["lora_id"] for ref in info["lora_paths"] if ref["lora_name"] == name]
    for key in (adapter_id, "x", None):
        answer = served.server.post(
            "/generate",
            input_ids=prompt,
            extra_key=key,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        ).json()
        assert answer["output_ids"] == served.expected(None, prompt)
        assert answer["meta_info"]["cached_tokens"] == 0
    served.check([name], [prompt])


def test_memory_is_not_released_under_requests(served: Served) -> None:
    import threading

    long = {"input_ids": PROMPTS[0], "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}}
    running = threading.Thread(target=served.server.post, args=("/generate",), kwargs=long)
    running.start()
    while served.server.get("/v1/loads?include=core").json()["loads"][0]["num_running_reqs"] == 0:
        pass
    refused = served.server.post("/release_memory_occupation", tags=["kv_cache"])
    assert refused.status_code == 409, refused.text
    assert served.server.post("/resume_memory_occupation", tags=["kv_cache"]).status_code == 409
    running.join()
    served.check(["bd2-r8", None], [PROMPTS[0]] * 2)
    assert served.server.post("/release_memory_occupation", tags=["nope"]).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/slow_down", {"forward_sleep_time": 1e9}),
        ("/open_session", {"capacity_of_str_len": 2**40}),
        ("/open_session", {"capacity_of_str_len": -1}),
        ("/start_profile", {"num_steps": -1}),
        ("/start_profile", {"activities": ["nope"]}),
        ("/flush_cache?timeout=1e300", {}),
    ],
)
def test_wrong_control_requests(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = served.server.post(path, **body)
    assert 400 <= answer.status_code < 500, answer.text
    served.check(["bd2-r8", None], [PROMPTS[0]] * 2)
