"""Thousands of wrong requests among good ones: none ends the server or gets its own fault called the server's."""

import threading

import requests as http
from hypothesis import given

from tests.fuzzing import fuzz_settings
from tests.serving.api.fuzz_strategies import requests
from tests.serving.api.served import Served
from tests.serving.zoo import PROMPTS

_MEMORY_GROWTH = 64 << 20


def test_no_request_ends_the_server(served: Served) -> None:
    stop = threading.Event()
    wrong: list[BaseException] = []

    def good_ones() -> None:
        while not stop.is_set():
            try:
                served.check(["bd2-r8", None, "bd4-r8"], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
            except BaseException as error:
                wrong.append(error)
                return
            stop.wait(0.5)

    count: dict[int, int] = {}

    @fuzz_settings(250)
    @given(requests())
    def send(request: tuple[str, dict[str, object]]) -> None:
        path, body = request
        answer = http.post(served.server.url + path, json=body, timeout=120)
        count[answer.status_code] = count.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (path, body, answer.text[:500])
        assert not wrong, wrong

    before = served.server.scheduler_memory()
    thread = threading.Thread(target=good_ones)
    thread.start()
    try:
        send()
    finally:
        stop.set()
        thread.join()
        print(f"answers by status: {count}")
    assert not wrong, wrong
    assert served.server.get("/health").status_code == 200
    for load in served.server.get("/v1/loads?include=core").json()["loads"]:
        assert load["num_running_reqs"] == load["num_waiting_reqs"] == 0
    # An adapter that is still counted as used could not be unloaded.
    for name in ("bd2-r8", "bd4-r8"):
        assert served.unload(name).status_code == 200
        assert served.load(name, served.adapters[name]).status_code == 200
    for first, last in zip(before, served.server.scheduler_memory(), strict=True):
        assert last < first + _MEMORY_GROWTH
