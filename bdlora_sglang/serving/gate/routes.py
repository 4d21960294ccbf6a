"""Routes that answer in place of SGLang's: those that list models or name one in the answer, and the server's facts."""

import os
from typing import Any

import orjson
from jinja2 import TemplateError
from pydantic import BaseModel
from sglang.srt.entrypoints.http_server import available_models, get_global_state, server_info
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest, OllamaTagsResponse
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import ModelCard
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import Scope

from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.families import Family
from bdlora_sglang.serving.gate.masking import masked, secrets_of


def _json(content: Any, status: int = 200) -> Response:
    if isinstance(content, BaseModel):
        content = content.model_dump()
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")


def _manager() -> Any:
    return get_global_state().tokenizer_manager


async def _model_cards() -> list[ModelCard]:
    """SGLang's, and the adapters that ``--max-loaded-loras`` has evicted for now."""
    cards = list((await available_models()).data)
    listed = {card.id for card in cards}
    for name in sorted(_manager().names.listed() - listed):
        ref = _manager().lora_ref_cache[name]
        cards.append(ModelCard(id=name, root=ref.lora_path, parent=_manager().served_model_name, max_model_len=None))
    return cards


async def list_models(_: Request) -> Response:
    return _json({"object": "list", "data": [card.model_dump() for card in await _model_cards()]})


async def one_model(request: Request) -> Response:
    name = request.path_params["model"]
    for card in await _model_cards():
        if card.id == name:
            return _json(card)
    return _json(Family.OPENAI.error(404, f"The model '{name}' does not exist", "model"), 404)


async def facts(_: Request) -> Response:
    return _json(masked(await server_info(), secrets_of(_manager().server_args)))


class _CalledOtherwise:
    """SGLang's TokenizerManager under the name that a client asked for, which Ollama's answers repeat."""

    def __init__(self, manager: Any, name: str) -> None:
        self._manager, self.served_model_name = manager, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class _Ollama(OllamaServing):
    """SGLang's, whose answers are shorter where its 2048 tokens would not fit the model."""

    def __init__(self, name: str) -> None:
        super().__init__(_CalledOtherwise(_manager(), name))

    def _convert_options_to_sampling_params(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        params: dict[str, Any] = super()._convert_options_to_sampling_params(options)
        if "num_predict" not in (options or {}):
            params["max_new_tokens"] = min(params["max_new_tokens"], self.tokenizer_manager.context_len // 2)
        return params


async def _answer_ollama(request: Request, kind: type[BaseModel], method: str) -> Response:
    try:
        fields = kind.model_validate(orjson.loads(await request.body()))
        answer = await getattr(_Ollama(fields.model), method)(fields, request)  # type: ignore[attr-defined]
    except RequestError:
        raise
    # Of the body, of the chat template, and what SGLang finds wrong.
    except (ValueError, TypeError, IndexError, TemplateError) as error:
        return _json({"error": str(error)}, 400)
    return answer if isinstance(answer, Response) else _json(answer)


async def ollama_chat(request: Request) -> Response:
    return await _answer_ollama(request, OllamaChatRequest, "handle_chat")


async def ollama_generate(request: Request) -> Response:
    return await _answer_ollama(request, OllamaGenerateRequest, "handle_generate")


async def ollama_tags(_: Request) -> Response:
    models = [model for card in await _model_cards() for model in _Ollama(card.id).get_tags().models]
    return _json(OllamaTagsResponse(models=models))


# Where the environment puts SGLang's.
ROUTES = Router(
    [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", one_model),
        Route("/server_info", facts),
        Route("/get_server_info", facts),
        Route(os.environ.get("SGLANG_OLLAMA_CHAT_ROUTE", "/api/chat"), ollama_chat, methods=["POST"]),
        Route(os.environ.get("SGLANG_OLLAMA_GENERATE_ROUTE", "/api/generate"), ollama_generate, methods=["POST"]),
        Route(os.environ.get("SGLANG_OLLAMA_TAGS_ROUTE", "/api/tags"), ollama_tags),
    ]
)


def is_ours(scope: Scope) -> bool:
    """Whether `ROUTES` answers this request."""
    return any(route.matches(scope)[0] is Match.FULL for route in ROUTES.routes)
