"""Times: one kernel and one collective by hand, and what must go up or down with what."""

from dataclasses import replace
from itertools import pairwise

import pytest

from bdlora_perf.estimate.hardware import GPUS, NVLINK3, PCIE4, Collective, CollectiveKind, Link, sources
from bdlora_perf.estimate.lora_cost import BASE, Assumptions, Serving, bd_lora, csgmv, replicated, s_lora
from bdlora_perf.estimate.model_shape import SHAPES
from bdlora_perf.estimate.roofline import Deployment
from bdlora_perf.estimate.traffic import Distribution, Traffic

MODEL_70B = SHAPES["llama-3.1-70b"]
ONE = Traffic(concurrency=1, adapters=1)
MANY = Traffic(concurrency=64, adapters=64, distribution=Distribution.DISTINCT)


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(MODEL_70B, GPUS["a100"], tp=8)


def test_a_decode_step_reads_the_weights_once(deployment: Deployment) -> None:
    # All matrices but the embedding, bfloat16, over 8 GPUs; activations are a thousandth of that.
    layer = 8192 * (8192 + 1024 + 1024) + 8192 * 8192 + 3 * 8192 * 28672
    read = 2 * (80 * layer + 128256 * 8192) / 8
    step = deployment.requests(BASE, ONE).decode
    assert step.weights == pytest.approx(read / (2039e9 * 0.78), rel=2e-3)
    assert step.launches == pytest.approx((80 * 9 + 3) * 1.3e-6)
    assert step.lora == step.lora_collectives == step.lora_launches == 0


def test_the_base_model_sends_what_the_paper_says(deployment: Deployment) -> None:
    step = deployment.requests(BASE, replace(ONE, concurrency=32)).decode
    # By NCCL's and the engine's times: 161 all-reduces of 2 (tp - 1) h N / tp values, an all-gather of the logits.
    reduce = 10.1e-6 + 2 * 2 * 7 * 8192 * 32 / 8 / 231e9
    assert step.collectives == pytest.approx(161 * reduce + 12.5e-6 + 2 * 7 * 128256 * 32 / 8 / 254e9)


def test_a_prefill_is_bound_by_arithmetic(deployment: Deployment) -> None:
    layer = 8192 * (8192 + 1024 + 1024) + 8192 * 8192 + 3 * 8192 * 28672
    # Eight prompts of 1024 tokens fill a chunk of 8192; activations take what the arithmetic does not.
    flops = 2 * 8192 * 80 * layer / 8
    step = deployment.requests(BASE, replace(ONE, concurrency=8)).prefill
    assert flops / 271.2e12 < step.weights < 1.15 * flops / 271.2e12


@pytest.mark.parametrize(
    ("kind", "num_bytes", "link", "microseconds"),
    [
        # NCCL's latency, and 7/8 of 8 KB at 254 GB/s.
        ("all-gather", 8000, NVLINK3, 12.5 + 7000 / 254e3),
        # 14/8 of 1 GB at 231 GB/s.
        ("all-reduce", 1e9, NVLINK3, 17.0 + 1.75e9 / 231e3),
        # PCIe has no kernel of the engine's own, and a tenth of NVLink 3's 240 GB/s.
        ("all-reduce", 8000, PCIE4, 17.0 + 14000 / 23.1e3),
        ("all-reduce", 8000, NVLINK3, 10.1 + 14000 / 231e3),
    ],
    ids=["all-gather", "all-reduce", "all-reduce-PCIe", "custom"],
)
def test_collectives_by_hand(kind: CollectiveKind, num_bytes: float, link: Link, microseconds: float) -> None:
    assert Collective(kind, num_bytes).seconds(link, tp=8) == pytest.approx(microseconds * 1e-6)
    assert Collective(kind, num_bytes).seconds(link, tp=1) == 0


@pytest.mark.parametrize(
    ("distribution", "distinct"),
    # Two adapters, two requests. Uniform: 2 (1 - 1/4). Zipf: weights 1 and 1/2, so 2/3 and 1/3: 8/9 + 5/9.
    [(Distribution.DISTINCT, 2), (Distribution.UNIFORM, 1.5), (Distribution.ZIPF, 13 / 9)],
    ids=lambda value: getattr(value, "value", ""),
)
def test_distinct_adapters_in_a_batch(distribution: Distribution, distinct: float) -> None:
    assert Traffic(adapters=2, distribution=distribution).distinct(2) == pytest.approx(distinct)


@pytest.mark.parametrize("traffic", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.1-70b"])
def test_more_ranks_read_less_and_wait_longer(model: str, traffic: Traffic) -> None:
    steps = [Deployment(SHAPES[model], GPUS["h200"], tp).requests(s_lora(64), traffic).decode for tp in (2, 4, 8)]
    for fewer, more in pairwise(steps):
        assert more.weights < fewer.weights and more.lora < fewer.lora
        assert more.lora_collectives > fewer.lora_collectives


@pytest.mark.parametrize("traffic", [ONE, MANY], ids=["one", "many"])
def test_who_is_faster(deployment: Deployment, traffic: Traffic) -> None:
    base, bd, plain, reduced, sharded = (
        deployment.requests(serving, traffic).e2e_latency
        for serving in (BASE, bd_lora(128, 8), replicated(64), csgmv(64), s_lora(64))
    )
    assert base < bd < plain < reduced and bd < sharded


def test_a_larger_rank_is_slower_and_bd_lora_sends_nothing(deployment: Deployment) -> None:
    def decode(serving: Serving, traffic: Traffic) -> float:
        step = deployment.requests(serving, traffic).decode
        assert (step.lora_collectives > 0) == (serving.name in {"s-lora", "csgmv"})
        return step.seconds

    for make in (lambda r: bd_lora(r, 8), replicated, csgmv, s_lora):
        assert decode(make(16), MANY) < decode(make(64), MANY) < decode(make(256), MANY)
        assert decode(make(64), ONE) < decode(make(64), MANY)


def test_no_step_is_shorter_than_the_hosts() -> None:
    """What the GPU does not need, it waits; what it does need stays as it is."""
    alone, batch = Deployment(SHAPES["llama-3.1-8b"], GPUS["a100"], 8), ONE.decode()
    gpu = alone.step(s_lora(16), batch)
    for host in (0.5 * gpu.seconds, 2 * gpu.seconds):
        step = replace(alone, assumptions=Assumptions("", host=host)).step(s_lora(16), batch)
        assert step.seconds == pytest.approx(max(host, gpu.seconds))
        assert replace(step, waiting=0.0) == gpu


def test_every_constant_has_a_source() -> None:
    for gpu in GPUS.values():
        listed = dict(sources(gpu))
        assert len(listed) == len(list(sources(gpu)))  # no two of one name
        assert all(constant.source and constant.value > 0 for constant in listed.values())
        assert {gpu.peak, gpu.matmul, gpu.bandwidth, gpu.memory, gpu.link.bandwidth} <= set(listed.values())
        assert gpu.matmul.value < gpu.peak.value
