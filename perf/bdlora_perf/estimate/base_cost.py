"""What the base model computes, reads and sends on one rank, for one batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bdlora_perf.estimate.collectives import Collective, Kind
from bdlora_perf.estimate.model_shape import BYTES_PER_WEIGHT, ModelShape
from bdlora_perf.estimate.traffic import Traffic

# Of one decoder layer without LoRA: two norms, qkv, rotary embedding with the write to the KV cache, attention, output,
# gate and up, activation, down; the two all-reduces count as collectives.
KERNELS_PER_LAYER = 9
# Embedding, last norm, output head.
KERNELS_PER_STEP = 3


@dataclass(frozen=True)
class Work:
    """One kernel's floating-point operations and bytes of memory traffic."""

    flops: float
    num_bytes: float


@dataclass(frozen=True)
class Batch:
    """One step: ``tokens`` new ones of ``sequences``; ``attended`` query-key pairs, ``cached`` positions read."""

    tokens: int
    sequences: int
    attended: float
    cached: float


def prefill_batch(traffic: Traffic, prompts: int) -> Batch:
    """That many whole prompts."""
    tokens = prompts * traffic.input_len
    return Batch(tokens, prompts, attended=tokens * (traffic.input_len + 1) / 2, cached=tokens)


def decode_batch(traffic: Traffic) -> Batch:
    """A decode step halfway through the output."""
    positions = traffic.concurrency * (traffic.input_len + math.ceil(traffic.output_len / 2))
    return Batch(traffic.concurrency, traffic.concurrency, attended=positions, cached=positions)


def dense_work(shape: ModelShape, tp: int, batch: Batch) -> Iterator[Work]:
    """Matrix products and element-wise kernels of one decoder layer."""
    for layer in shape.fused_layers(tp):
        weights = sum(m.local_inputs * m.local_outputs for m in layer)
        features = layer[0].local_inputs + sum(m.local_outputs for m in layer)
        yield Work(2 * batch.tokens * weights, (weights + batch.tokens * features) * BYTES_PER_WEIGHT)
    # Both norms read and write hidden state and residual; the activation reads two and writes one.
    features = 8 * shape.hidden + 3 * shape.intermediate / tp
    yield Work(0.0, batch.tokens * features * BYTES_PER_WEIGHT)


def attention_work(shape: ModelShape, tp: int, batch: Batch) -> Work:
    """Attention of one decoder layer: queries in, outputs out, new keys and values in, the KV cache read once."""
    query = shape.heads * shape.head_dim / tp
    cache = 2 * shape.local_kv_heads(tp) * shape.head_dim
    traffic = batch.cached * cache + batch.tokens * (2 * query + cache)
    return Work(4 * batch.attended * query, traffic * BYTES_PER_WEIGHT)


def head_work(shape: ModelShape, tp: int, batch: Batch) -> Work:
    """The output head, for the last token of each sequence."""
    weights = shape.vocabulary * shape.hidden / tp
    return Work(2 * batch.sequences * weights, weights * BYTES_PER_WEIGHT)


def base_collectives(shape: ModelShape, batch: Batch) -> dict[Collective, int]:
    """How often each is done: an all-reduce after the embedding and each row-parallel layer, the logits' all-gather."""
    return {
        Collective(Kind.ALL_REDUCE, batch.tokens * shape.hidden, BYTES_PER_WEIGHT): 2 * shape.layers + 1,
        Collective(Kind.ALL_GATHER, batch.sequences * shape.vocabulary, BYTES_PER_WEIGHT): 1,
    }
