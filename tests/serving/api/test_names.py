"""Every model that ``/v1/models`` lists answers on every endpoint under that name; others are not found."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests
from transformers import AutoTokenizer

from tests.serving.api.served import NEW_TOKENS, Served

PROMPT = "the quick brown fox"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
SAMPLING = {"temperature": 0, "max_tokens": NEW_TOKENS, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.server.url + "/v1", api_key="none", max_retries=0)


def _completion(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, **SAMPLING)  # type: ignore[call-overload]
    assert answer.model == model
    return str(answer.choices[0].text)


def _completion_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.completions.create(model=model, prompt=PROMPT, stream=True, **SAMPLING)  # type: ignore[call-overload]
    return "".join(part.choices[0].text for part in stream if part.choices)


def _chat(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **SAMPLING)  # type: ignore[call-overload]
    assert answer.model == model
    return str(answer.choices[0].message.content)


def _chat_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **SAMPLING)  # type: ignore[call-overload]
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def _response(client: openai.OpenAI, model: str) -> str:
    answer = client.responses.create(
        model=model, input=MESSAGES, temperature=0, max_output_tokens=NEW_TOKENS, extra_body={"ignore_eos": True}
    )
    return str(answer.output_text)


def _response_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.responses.create(
        model=model,
        input=MESSAGES,
        temperature=0,
        max_output_tokens=NEW_TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join(event.delta for event in stream if event.type == "response.output_text.delta")


def _anthropic(client: openai.OpenAI, model: str, **more: Any) -> requests.Response:
    body = {"model": model, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0, **more}
    return requests.post(f"{client.base_url}messages", json=body, timeout=60)


def _message(client: openai.OpenAI, model: str) -> str:
    answer = _anthropic(client, model)
    if answer.status_code == 404:
        assert answer.json()["error"]["type"] == "not_found_error"
        raise LookupError
    assert answer.json()["model"] == model
    return "".join(part["text"] for part in answer.json()["content"])


def _message_stream(client: openai.OpenAI, model: str) -> str:
    answer = _anthropic(client, model, stream=True)
    if answer.status_code == 404:
        raise LookupError
    events = [json.loads(line[len("data: ") :]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")


def _ollama(client: openai.OpenAI, model: str, path: str, stream: bool, **body: Any) -> list[dict[str, Any]]:
    options = {"temperature": 0, "num_predict": NEW_TOKENS}
    url = f"{str(client.base_url).removesuffix('/v1/')}/api/{path}"
    answer = requests.post(url, json={"model": model, "stream": stream, "options": options, **body}, timeout=60)
    if answer.status_code == 404:
        assert model in answer.json()["error"]
        raise LookupError
    parts = [json.loads(line) for line in answer.text.splitlines()]
    assert all(part["model"] == model for part in parts)
    return parts


def _ollama_chat(client: openai.OpenAI, model: str) -> str:
    return str(_ollama(client, model, "chat", stream=False, messages=MESSAGES)[0]["message"]["content"])


def _ollama_chat_stream(client: openai.OpenAI, model: str) -> str:
    return "".join(
        part["message"]["content"] for part in _ollama(client, model, "chat", stream=True, messages=MESSAGES)
    )


def _ollama_generate(client: openai.OpenAI, model: str) -> str:
    return str(_ollama(client, model, "generate", stream=False, prompt=PROMPT)[0]["response"])


ENDPOINTS: dict[str, tuple[Callable[[openai.OpenAI, str], str], bool]] = {
    # The second says whether the prompt is put into the chat template.
    "completions": (_completion, False),
    "completions stream": (_completion_stream, False),
    "chat": (_chat, True),
    "chat stream": (_chat_stream, True),
    "responses": (_response, True),
    "responses stream": (_response_stream, True),
    "messages": (_message, True),
    "messages stream": (_message_stream, True),
    "ollama chat": (_ollama_chat, True),
    "ollama chat stream": (_ollama_chat_stream, True),
    "ollama generate": (_ollama_generate, False),
}


@pytest.fixture(scope="module")
def expected(served: Served) -> Callable[[str | None, bool], str]:
    tokenizer = AutoTokenizer.from_pretrained(served.model)

    def text(adapter: str | None, chat: bool) -> str:
        ids = tokenizer.encode(PROMPT)
        if chat:
            ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        tokens = served.expected(served.adapters.get(adapter or ""), list(ids))
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return text


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_adapter_answers_under_its_name(
    client: openai.OpenAI, expected: Callable[[str | None, bool], str], served: Served, endpoint: str
) -> None:
    ask, chat = ENDPOINTS[endpoint]
    wanted = expected("bd4-r8", chat)
    assert wanted != expected(None, chat), "the adapter changes nothing"
    names = ["bd4-r8", "base:bd4-r8", f"{served.model}:bd4-r8"]
    shown, *others = [ask(client, name) for name in names]
    assert others == [shown, shown]
    # Some APIs know no `ignore_eos`, and SGLang's stream of Ollama's leaves the last part out.
    assert shown and wanted.startswith(shown)
    assert not expected(None, chat).startswith(shown)
    assert expected(None, chat).startswith(ask(client, str(served.model)))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_unknown_model_is_not_found(client: openai.OpenAI, endpoint: str) -> None:
    for name in ("nope", "base:nope", "nope:bd4-r8"):
        with pytest.raises((openai.NotFoundError, LookupError)):
            ENDPOINTS[endpoint][0](client, name)


def test_every_listed_model_can_be_asked_about(client: openai.OpenAI, served: Served) -> None:
    names = [model.id for model in client.models.list()]
    assert set(served.adapters) < set(names)
    for name in names:
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    tags = served.server.get("/api/tags").json()["models"]
    assert {tag["name"] for tag in tags} == set(names)


def test_names_with_slashes_spaces_and_colons(client: openai.OpenAI, served: Served, expected: Any) -> None:
    for name in ("team/sql adapter", "a:b"):
        assert served.load(name, served.adapters["bd4-r8"]).status_code == 200
        assert client.models.retrieve(name).id == name
        for ask, chat in (ENDPOINTS["chat"], ENDPOINTS["responses stream"], ENDPOINTS["completions"]):
            assert expected("bd4-r8", chat).startswith(ask(client, name))
        assert served.unload(name).status_code == 200


def test_no_adapter_hides_the_base_model(served: Served) -> None:
    for name in (str(served.model), "default", "base", "base:bd4-r8", f"{served.model}:x", "", " a", "a\n"):
        refused = served.load(name, served.adapters["bd4-r8"])
        assert refused.status_code == 400, name
        assert "adapter name" in refused.text


def test_unloaded_is_unloaded(client: openai.OpenAI, served: Served) -> None:
    assert served.load("gone", served.adapters["bd4-r8"]).status_code == 200
    _completion(client, "gone")
    assert served.unload("gone").status_code == 200
    for ask in (_completion, _chat_stream):
        with pytest.raises(openai.NotFoundError):
            ask(client, "gone")
    native = served.server.post("/generate", text=PROMPT, lora_path="gone")
    assert native.status_code == 404 and "gone" in native.text
