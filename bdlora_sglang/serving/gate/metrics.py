"""What Prometheus is told about adapters, beside SGLang's own series: ``/metrics`` with ``--enable-metrics``."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Series by adapter: so many; what all others do is told together.
MAX_ADAPTERS = 100
OTHERS = "(others)"
BASE = ""


class AdapterCounts:
    """What was done for each adapter since the start. The base model is the adapter ""."""

    def __init__(self) -> None:
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self.load_seconds: defaultdict[str, float] = defaultdict(float)
        self._known: set[str] = {BASE}

    def label(self, adapter: str | None) -> str:
        """The adapter's name; once there are too many of them, one label for all that come after."""
        name = adapter or BASE
        if name not in self._known and len(self._known) < MAX_ADAPTERS:
            self._known.add(name)
        return name if name in self._known else OTHERS

    def finished(self, adapter: str | None, prompt_tokens: int, generation_tokens: int) -> None:
        self.prompt_tokens[self.label(adapter)] += prompt_tokens
        self.generation_tokens[self.label(adapter)] += generation_tokens

    def loaded(self, adapter: str, seconds: float) -> None:
        self.loads[self.label(adapter)] += 1
        self.load_seconds[self.label(adapter)] += seconds

    def families(self) -> Iterable[Metric]:
        totals: list[tuple[str, str, Mapping[str, float]]] = [
            ("adapter_prompt_tokens", "Prompt tokens of finished requests.", self.prompt_tokens),
            ("adapter_generation_tokens", "Generated tokens of finished requests.", self.generation_tokens),
            ("adapter_loads", "How often an adapter was loaded to the host while the server ran.", self.loads),
            ("adapter_load_seconds", "Seconds that these loads took.", self.load_seconds),
        ]
        for name, text, values in totals:
            family = CounterMetricFamily(f"bdlora:{name}", text, labels=["adapter"])
            for adapter, value in sorted(values.items()):
                family.add_metric([adapter], value)
            yield family


def state_families(states: list[dict[str, Any]], counts: AdapterCounts) -> Iterable[Metric]:
    """What runs, waits and is resident now, by `adapters_now` of each data-parallel replica."""
    for key, text in (("running", "Requests in a batch."), ("waiting", "Requests that wait for a batch.")):
        # Those that nobody asks for now are told as 0.
        requests = Counter({counts.label(name): 0 for state in states for name in (BASE, *state["host"])})
        for state in states:
            for adapter, number in state[key].items():
                requests[counts.label(adapter)] += number
        family = GaugeMetricFamily(f"bdlora:adapter_requests_{key}", text, labels=["adapter"])
        for adapter, number in sorted(requests.items()):
            family.add_metric([adapter], number)
        yield family
    resident = GaugeMetricFamily(
        "bdlora:adapter_resident", "Replicas that hold the adapter there.", labels=["adapter", "memory"]
    )
    for memory in ("host", "device"):
        where = Counter(counts.label(adapter) for state in states for adapter in state[memory])
        for adapter, number in sorted(where.items()):
            resident.add_metric([adapter, memory], number)
    yield resident
    yield _gateway_gauge(states)


def _gateway_gauge(states: list[dict[str, Any]]) -> Metric:
    """vLLM's, by which inference gateways choose a server that has the adapter: the newest value counts."""
    names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    family = GaugeMetricFamily("vllm:lora_requests_info", "Running stats on LoRA requests.", labels=names)
    running, waiting = (
        sorted({adapter for state in states for adapter in state[key] if adapter})[:MAX_ADAPTERS]
        for key in ("running", "waiting")
    )
    slots = max((state["slots"] for state in states), default=0)
    family.add_metric([str(slots), ",".join(running), ",".join(waiting)], time.time())
    return family


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(families: Iterable[Metric]) -> bytes:
    """In Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def adapters_now(scheduler: Any) -> dict[str, Any]:
    """What a scheduler does with its adapters, by name; the base model is ""."""
    manager = scheduler.tp_worker.model_runner.lora_manager
    names = {lora_id: str(ref.lora_name) for lora_id, ref in manager.lora_refs.items()}

    def count(requests: Iterable[Any]) -> dict[str, int]:
        return dict(Counter(names.get(r.lora_id, BASE) for r in requests if not r.finished()))

    waiting = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    resident = [names[lora_id] for lora_id in manager.memory_pool.uid_to_buffer_id if lora_id in names]
    return {
        "running": count(scheduler.collect_inflight_reqs()),
        "waiting": count(waiting),
        "host": sorted(names.values()),
        "device": sorted(resident),
        "slots": manager.max_loras_per_batch,
    }
