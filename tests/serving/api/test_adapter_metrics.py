"""Metrics by adapter, as Prometheus and inference gateways read them, and the dashboard that shows them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from bdlora_sglang.serving.gate.metrics import MAX_ADAPTERS, OTHERS, AdapterCounts, exposition
from tests.serving.api.served import Served
from tests.serving.zoo import PROMPTS

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana-adapters.json"


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _value(served: Served, name: str, **labels: str) -> float:
    samples = list(_samples(served.server.get("/metrics").text))
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_tokens_loads_and_residency_by_adapter(served: Served) -> None:
    name = "metered"
    assert served.load(name, served.adapters["bd2-r8"]).status_code == 200
    before = {label: _value(served, "bdlora:adapter_generation_tokens_total", adapter=label) for label in (name, "")}
    for adapter, new_tokens in ((name, 5), (name, 7), (None, 3)):
        served.server.generate([adapter], [PROMPTS[0]], new_tokens)
    assert _value(served, "bdlora:adapter_generation_tokens_total", adapter=name) - before[name] == 12
    assert _value(served, "bdlora:adapter_generation_tokens_total", adapter="") - before[""] >= 3
    assert _value(served, "bdlora:adapter_prompt_tokens_total", adapter=name) == 2 * len(PROMPTS[0])
    assert _value(served, "bdlora:adapter_loads_total", adapter=name) == 1
    assert _value(served, "bdlora:adapter_load_seconds_total", adapter=name) > 0
    for memory in ("host", "device"):
        assert _value(served, "bdlora:adapter_resident", adapter=name, memory=memory) == 1
    assert served.unload(name).status_code == 200
    assert _value(served, "bdlora:adapter_resident", adapter=name) == 0
    log = "\n".join(served.server.log_lines())
    assert f"Adapter '{name}' is loaded from" in log


def test_running_requests_and_the_gauge_of_gateways(served: Served) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    body = {"input_ids": PROMPTS[0], "lora_path": "bd2-r8", "sampling_params": sampling}
    request = Thread(target=served.server.post, args=("/generate",), kwargs=body)
    request.start()
    running: list[float] = []
    gauges: list[Sample] = []
    while request.is_alive() and not any(running):
        samples = list(_samples(served.server.get("/metrics").text))
        name = "bdlora:adapter_requests_running"
        running = [s.value for s in samples if s.name == name and s.labels["adapter"] == "bd2-r8"]
        gauges = [s for s in samples if s.name == "vllm:lora_requests_info"]
    request.join()
    assert running == [1]
    assert len(gauges) == 1
    assert gauges[0].labels["running_lora_adapters"] == "bd2-r8"
    assert gauges[0].labels["waiting_lora_adapters"] == ""
    assert int(gauges[0].labels["max_lora"]) >= 4
    # With a compressing client, too.
    assert _value(served, "vllm:lora_requests_info") > 1e9


def test_labels_are_bounded() -> None:
    counts = AdapterCounts()
    for index in range(3 * MAX_ADAPTERS):
        counts.finished(f"adapter{index}", 1, 2)
    samples = list(_samples(exposition(counts.families()).decode()))
    labels = {s.labels["adapter"] for s in samples}
    assert len(labels) == MAX_ADAPTERS and OTHERS in labels
    assert sum(s.value for s in samples if s.name == "bdlora:adapter_generation_tokens_total") == 6 * MAX_ADAPTERS


def test_the_dashboard_shows_series_that_exist(served: Served) -> None:
    text = served.server.get("/metrics").text
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"\b(?:bdlora|sglang):\w+", target["expr"]):
                assert f"\n{name}" in text, name
