"""Grammars hold for the base model and for adapters, on all interfaces, and leave their neighbours in a batch alone."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from jsonschema import validate

from tests.serving.api.served import NEW_TOKENS, Served
from tests.serving.zoo import PROMPTS

NAMES: tuple[str | None, ...] = (None, "bd2-r8", "plain-r16", "bd4-r8")

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{3,6}$"},
        "kind": {"enum": ["port", "harbour"]},
        "people": {"type": "integer", "minimum": 10, "maximum": 999},
        "coastal": {"type": "boolean"},
        "streets": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "kind", "people", "coastal", "streets"],
    "additionalProperties": False,
}
REGEX = "(red|green|blue)-[0-9]{3}"
EBNF = """root ::= "(" number ("+" number)? ")"
number ::= [1-9] [0-9]?"""
EBNF_AS_REGEX = r"\([1-9][0-9]?(\+[1-9][0-9]?)?\)"

TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
    for name, parameters in {
        "look_up": SCHEMA,
        "wait": {
            "type": "object",
            "properties": {"seconds": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["seconds"],
            "additionalProperties": False,
        },
    }.items()
]


def assert_matches(grammar: str, text: str) -> None:
    if grammar == "json_schema":
        validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch({"regex": REGEX, "ebnf": EBNF_AS_REGEX}[grammar], text), text


GRAMMARS = {"json_schema": json.dumps(SCHEMA), "regex": REGEX, "ebnf": EBNF}


def sampling(new_tokens: int = 120, **parameters: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new_tokens, **parameters}


def base(name: str | None) -> str:
    """The ``model`` of OpenAI's API that stands for an adapter, or for the base model."""
    return f"base:{name}" if name else "base"


def events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line[len(b"data: ") :])


def test_one_batch_with_and_without_grammars(served: Served) -> None:
    """Every grammar with every adapter and the base model; the unconstrained answers are PEFT's, token by token."""
    for grammar, text in GRAMMARS.items():
        names = NAMES * 2
        parameters = [sampling(**{grammar: text})] * len(NAMES)
        parameters += [sampling(NEW_TOKENS, ignore_eos=True)] * len(NAMES)
        response = served.server.post(
            "/generate", input_ids=[PROMPTS[0]] * len(names), lora_path=list(names), sampling_params=parameters
        )
        assert response.status_code == 200, response.text
        answers = response.json()
        for name, answer in zip(NAMES, answers[: len(NAMES)], strict=True):
            assert answer["meta_info"]["finish_reason"]["type"] == "stop", (grammar, name)
            assert_matches(grammar, answer["text"])
        for name, answer in zip(NAMES, answers[len(NAMES) :], strict=True):
            assert answer["output_ids"] == served.expected(served.adapters.get(name or ""), PROMPTS[0]), (grammar, name)
        # Else the base model's answers would do for all.
        assert len({answer["text"] for answer in answers[: len(NAMES)]}) > 1


def test_sampled_at_a_temperature(served: Served) -> None:
    parameters = {**sampling(json_schema=GRAMMARS["json_schema"]), "temperature": 1.0, "top_p": 0.95}
    response = served.server.post(
        "/generate", input_ids=[PROMPTS[1]] * 8, lora_path=[*NAMES, *NAMES], sampling_params=parameters
    )
    for answer in response.json():
        assert_matches("json_schema", answer["text"])


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_streamed(served: Served, grammar: str) -> None:
    with requests.post(
        served.server.url + "/generate",
        json={
            "input_ids": PROMPTS[0],
            "lora_path": "bd4-r8",
            "stream": True,
            "sampling_params": sampling(**{grammar: GRAMMARS[grammar]}),
        },
        stream=True,
        timeout=60,
    ) as response:
        texts = [event["text"] for event in events(response)]
    assert len(texts) > 2, "the answer came in one piece"
    assert_matches(grammar, texts[-1])


@pytest.mark.parametrize("name", NAMES, ids=str)
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_openai_response_format(served: Served, endpoint: str, name: str | None) -> None:
    question: dict[str, Any] = {"prompt": "the quick brown fox"}
    if "chat" in endpoint:
        question = {"messages": [{"role": "user", "content": "the quick brown fox"}]}
    response_format = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    body = {"model": base(name), "temperature": 0, "max_tokens": 120, "response_format": response_format, **question}
    choice = served.server.post(endpoint, **body).json()["choices"][0]
    text = choice["message"]["content"] if "chat" in endpoint else choice["text"]
    assert choice["finish_reason"] == "stop"
    assert_matches("json_schema", text)

    streaming = {**body, "stream": True}
    with requests.post(served.server.url + endpoint, json=streaming, stream=True, timeout=60) as response:
        choices = [event["choices"][0] for event in events(response) if event["choices"]]
    pieces = [c["delta"].get("content") or "" if "chat" in endpoint else c["text"] for c in choices]
    assert sum(map(bool, pieces)) > 2, "the answer came in one piece"
    assert "".join(pieces) == text


def assert_calls(calls: list[dict[str, Any]], allowed: set[str]) -> None:
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert calls
    for call in calls:
        assert call["function"]["name"] in allowed
        validate(json.loads(call["function"]["arguments"]), parameters[call["function"]["name"]])


@pytest.mark.parametrize("name", NAMES, ids=str)
@pytest.mark.parametrize("choice", ["required", "look_up", "wait"])
def test_tools(served: Served, choice: str, name: str | None) -> None:
    """A call that is required, or that the request names, is made with arguments that its schema allows."""
    named = {"type": "function", "function": {"name": choice}}
    body = {
        "model": base(name),
        "messages": [{"role": "user", "content": "the quick brown fox"}],
        "tools": TOOLS,
        "tool_choice": choice if choice == "required" else named,
        # Else a random model adds calls until it runs out of tokens.
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    allowed = {tool["function"]["name"] for tool in TOOLS} if choice == "required" else {choice}
    answer = served.server.post("/v1/chat/completions", **body).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls", answer
    calls = answer["message"]["tool_calls"]
    assert_calls(calls, allowed)

    url = served.server.url + "/v1/chat/completions"
    with requests.post(url, json={**body, "stream": True}, stream=True, timeout=60) as response:
        deltas = [
            call
            for event in events(response)
            if event["choices"]
            for call in event["choices"][0]["delta"].get("tool_calls") or ()
        ]
    assert len(deltas) > 1, "the call came in one piece"
    streamed = {
        "name": "".join(delta["function"].get("name") or "" for delta in deltas),
        "arguments": "".join(delta["function"].get("arguments") or "" for delta in deltas),
    }
    assert_calls([{"function": streamed}], allowed)
    assert streamed["name"] == calls[0]["function"]["name"]
    assert json.loads(streamed["arguments"]) == json.loads(calls[0]["function"]["arguments"])


@pytest.mark.parametrize(
    ("grammar", "text"),
    [("json_schema", '{"type": "no such type"}'), ("regex", "(["), ("ebnf", "root ::= nowhere")],
)
def test_a_bad_grammar_is_refused_and_the_server_goes_on(served: Served, grammar: str, text: str) -> None:
    refused = served.server.post(
        "/generate", input_ids=PROMPTS[0], lora_path="bd2-r8", sampling_params=sampling(**{grammar: text})
    )
    assert refused.status_code == 400
    assert "grammar" in refused.text
    served.check(["bd2-r8", None], [PROMPTS[0], PROMPTS[1]])
