"""A server with keys, and with room for fewer adapters on the host than it knows."""

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch

from tests.serving.api.served import Served
from tests.serving.server import Server, running_server
from tests.serving.zoo import ADAPTERS, PROMPTS, Zoo

KEY, ADMIN_KEY = "key-of-users-7f3a", "key-of-admins-91bc"
MAX_LOADED = 4
NAMES = list(ADAPTERS)[: MAX_LOADED + 2]


class _WithKey(Server):
    """Sends the key of users, but for requests that steer the server."""

    def post(self, path: str, **body: object) -> requests.Response:
        key = ADMIN_KEY if "lora_adapter" in path else KEY
        return requests.post(self.url + path, json=body, headers=_bearer(key), timeout=120)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=_bearer(KEY), timeout=60)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def limited(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = zoo.model("llama")
    folder = tmp_path_factory.mktemp("adapters")
    for name, path in zoo.adapters(model).items():
        shutil.copytree(path, folder / name)
    first = folder / NAMES[0]
    log = tmp_path_factory.mktemp("server") / "limited.log"
    flags = (
        *("--adapters", first, "--max-loras-per-batch", 3, "--max-loaded-loras", MAX_LOADED, "--dtype", "float32"),
        *("--max-lora-rank", 16, "--lora-target-modules", "all", "--api-key", KEY, "--admin-api-key", ADMIN_KEY),
        "--enable-metrics",
    )
    with running_server(model, log, *flags, server_class=_WithKey) as server:
        yield Served(server, model, {name: folder / name for name in NAMES})


def test_more_adapters_than_the_host_holds(limited: Served) -> None:
    """All in turn and at once: those that were evicted are loaded again, and every answer is right."""
    for name in NAMES[1:]:
        assert limited.load(name, limited.adapters[name]).status_code == 200
    assert limited.server.adapters() == set(NAMES)
    rng = random.Random(5)
    batches = [[rng.choice([None, *NAMES]) for _ in range(3)] for _ in range(24)]
    for batch in batches:
        for name in batch:
            limited.expected(limited.adapters.get(name or ""), PROMPTS[0])
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda batch: limited.check(batch, [PROMPTS[0]] * 3), batches))
    refused = limited.server.post("/generate", input_ids=[[1]] * 5, lora_path=NAMES[:5])
    assert refused.status_code == 400 and "--max-loaded-loras" in refused.text
    # One that is evicted is forgotten, too, when it is unloaded.
    for name in NAMES[1:]:
        assert limited.unload(name).status_code == 200
    assert limited.server.adapters() == {NAMES[0]}
    assert limited.server.post("/generate", input_ids=[1], lora_path=NAMES[1]).status_code == 404


def test_adapters_come_from_their_folder_alone(limited: Served, tmp_path: Path) -> None:
    """What is elsewhere and what is nowhere read the same; links are followed first."""
    inside = limited.adapters[NAMES[1]]
    outside = tmp_path / "outside"
    shutil.copytree(inside, outside)
    link = inside.parent / "link"
    link.symlink_to(outside)
    half = inside.parent / "half"
    shutil.copytree(inside, half)
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    messages = set()
    try:
        up = inside / ".." / ".." / outside.name
        for path in (outside, tmp_path / "nowhere", link, half, up, "some/repo", "", "\x00", "x" * 5000):
            refused = limited.load("refused", Path(path) if isinstance(path, Path) else path)  # type: ignore[arg-type]
            assert refused.status_code == 400, path
            messages.add(refused.json()["error_message"].replace(repr(str(path)), "PATH"))
    finally:
        link.unlink()
        shutil.rmtree(half)
    assert len(messages) == 1 and "--adapter-root" in messages.pop()
    assert limited.load("inside", inside / ".." / inside.name).status_code == 200
    assert limited.unload("inside").status_code == 200


def test_keys_are_not_told(limited: Served) -> None:
    url = limited.server.url
    assert requests.get(url + "/server_info", timeout=60).status_code == 401
    for path in ("/server_info", "/get_server_info"):
        answer = requests.get(url + path, headers=_bearer(KEY), timeout=60)
        assert answer.status_code == 200 and "max_loaded_loras" in answer.text
        assert KEY not in answer.text and ADMIN_KEY not in answer.text
    log = "\n".join(limited.server.log_lines())
    assert "api_key" in log
    assert KEY not in log and ADMIN_KEY not in log
    assert requests.get(url + "/v1/models", timeout=60).status_code == 401
    by_user = requests.post(url + "/unload_lora_adapter", json={"lora_name": "x"}, headers=_bearer(KEY), timeout=60)
    assert by_user.status_code == 401


def test_memory_is_released_and_resumed(limited: Served) -> None:
    """Meanwhile requests are turned away. On a CPU, where SGLang would end, it is refused."""

    def ask(path: str) -> requests.Response:
        return requests.post(limited.server.url + path, json={}, headers=_bearer(ADMIN_KEY), timeout=60)

    released = ask("/release_memory_occupation")
    if torch.cuda.is_available():
        assert released.status_code == 200, released.text
        assert limited.server.post("/generate", input_ids=[1]).status_code == 503
        assert ask("/release_memory_occupation").status_code == 409
        assert limited.server.get("/health_generate").status_code == 200
        assert ask("/resume_memory_occupation").status_code == 200
    else:
        assert released.status_code == 400 and "GPU" in released.text
    limited.check([NAMES[0], None], [PROMPTS[0]] * 2)
