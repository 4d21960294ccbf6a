"""Several clients load, use and unload adapters at random."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

from tests.serving.api.served import NEW_TOKENS, TP, Served
from tests.serving.zoo import PROMPTS


def test_random_loads_uses_and_unloads(served: Served) -> None:
    """Several clients for a while (BDLORA_STRESS_SECONDS): every answer right, memory flat."""
    seconds = float(os.environ.get("BDLORA_STRESS_SECONDS", "15"))
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
