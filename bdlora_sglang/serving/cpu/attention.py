"""Attention on the CPU: SGLang's torch-native backend, with one product for many requests in place of one for each.

Shape suffixes: B requests, L tokens of the longest, H KV heads, G query heads of a KV head, D head size, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from torch.nn.functional import scaled_dot_product_attention

# Requests of about the same length are computed together, padded to the longest. A group holds lengths down to half of
# its longest, so that padding never doubles the work; below this length a call costs more than the padding.
_SHORT = 256
# Queries behind a cached prefix are computed so many at a time: the mask of a call is bounded, whatever the chunk size.
_QUERY_BLOCK = 512


@dataclass(frozen=True)
class DecodeGroup:
    """Requests of a decode batch that are computed together.

    Attributes:
        rows: their places in the batch; None where they are the whole batch in order.
        locations_BL: places of their tokens in the KV cache; past a request's end, its first token's.
        bias_B11L: what is added to the scores: zero, or minus infinity past a request's end; None where
            all end together.
    """

    rows: torch.Tensor | None
    locations_BL: torch.Tensor
    bias_B11L: torch.Tensor | None

    @classmethod
    def of(
        cls, rows: torch.Tensor | None, locations_BL: torch.Tensor, lengths: Sequence[int], dtype: torch.dtype
    ) -> "DecodeGroup":
        """``locations_BL`` past a request's end may be anything."""
        if min(lengths) == max(lengths):
            return cls(rows, locations_BL, None)
        is_past_end = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        # Not whatever stands there: it may be the infinity of another request.
        locations_BL = torch.where(is_past_end, locations_BL[:, :1], locations_BL)
        bias = torch.zeros(is_past_end.shape, dtype=dtype).masked_fill(is_past_end, float("-inf"))
        return cls(rows, locations_BL, bias[:, None, None])


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of requests in groups of similar length, longest first."""
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (lengths[place] * 2 < longest and longest > _SHORT):
            groups.append([])
            longest = lengths[place]
        groups[-1].append(place)
    return [sorted(group) for group in groups]


class BatchedAttention(TorchNativeAttnBackend):
    """Takes over decoding and prefill of decoder layers; sliding windows, cross-attention and other forwards are
    SGLang's (``TorchNativeAttnBackend``)."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._dtype = model_runner.dtype
        self._groups: list[DecodeGroup] | None = None
        self._locations: list[torch.Tensor] | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._groups = self._locations = None
        if forward_batch.encoder_lens is not None or self.use_sliding_window_kv_pool:
            return
        if forward_batch.forward_mode.is_decode():
            self._groups = self._decode_groups(forward_batch)
        elif forward_batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED):
            table = self.req_to_token_pool.req_to_token
            pools, lengths = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
            self._locations = [table[pool, :length] for pool, length in zip(pools, lengths, strict=True)]

    def _decode_groups(self, forward_batch: ForwardBatch) -> list[DecodeGroup]:
        lengths: list[int] = forward_batch.seq_lens.tolist()
        groups = group_by_length(lengths)
        return [self._decode_group(forward_batch, lengths, rows, len(groups) == 1) for rows in groups]

    def _decode_group(
        self, forward_batch: ForwardBatch, lengths: Sequence[int], rows: list[int], whole: bool
    ) -> DecodeGroup:
        place = None if whole else torch.tensor(rows)
        own = [lengths[row] for row in rows]
        pools = forward_batch.req_pool_indices if place is None else forward_batch.req_pool_indices[place]
        return DecodeGroup.of(place, self.req_to_token_pool.req_to_token[pools, : max(own)], own, self._dtype)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        if self._groups is None or not _is_plain(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        keys, values = self._cached(layer)
        heads = layer.tp_k_head_num
        q_BHGD = q.reshape(-1, heads, layer.tp_q_head_num // heads, layer.qk_head_dim)
        outputs = [_decode(q_BHGD, keys, values, group, layer.scaling) for group in self._groups]
        if len(outputs) == 1:
            return outputs[0].reshape(len(q_BHGD), -1)
        o = q.new_empty(len(q_BHGD), layer.tp_q_head_num * layer.v_head_dim)
        for group, output in zip(self._groups, outputs, strict=True):
            o[group.rows] = output.reshape(len(output), -1)
        return o

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        if self._locations is None or not _is_plain(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **options)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        keys, values = self._cached(layer)
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        heads = layer.tp_k_head_num
        q_THGD = q.reshape(-1, heads, layer.tp_q_head_num // heads, layer.qk_head_dim)
        o = q.new_empty(len(q_THGD), layer.tp_q_head_num, layer.v_head_dim)
        start = 0
        lengths = forward_batch.extend_seq_lens_cpu
        for length, locations in zip(lengths, self._locations, strict=True):
            k_LHD = keys.index_select(0, locations).to(q.dtype)
            v_LHD = values.index_select(0, locations).to(q.dtype)
            _prefill(o[start : start + length], q_THGD[start : start + length], k_LHD, v_LHD, layer.scaling, causal)
            start += length
        return o.view(len(o), -1)

    def _save(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache: bool
    ) -> None:
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _cached(self, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


def _is_plain(layer: RadixAttention) -> bool:
    """A decoder layer without what SGLang's own loops are needed for."""
    window = layer.sliding_window_size
    return not layer.is_cross_attention and (window is None or window < 0)


def _decode(
    q_BHGD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, scaling: float
) -> torch.Tensor:
    """Attention of one token a request: ``(B, H, G, D)``. A KV head's query heads are the rows of one product."""
    q = q_BHGD if group.rows is None else q_BHGD[group.rows]
    batch, heads, per_head, _ = q.shape
    length = group.locations_BL.shape[1]
    places = group.locations_BL.flatten()
    k = keys.index_select(0, places).view(batch, length, heads, -1).transpose(1, 2).to(q.dtype)
    v = values.index_select(0, places).view(batch, length, heads, -1).transpose(1, 2).to(q.dtype)
    bias = None if group.bias_B11L is None else group.bias_B11L.to(q.dtype).expand(batch, heads, per_head, length)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)


def _prefill(
    o: torch.Tensor, q_THGD: torch.Tensor, k_LHD: torch.Tensor, v_LHD: torch.Tensor, scaling: float, causal: bool
) -> None:
    """Attention of the last T of L tokens of one request, into ``o`` of ``(T, H * G, D)``."""
    tokens, length, per_head = len(q_THGD), len(k_LHD), q_THGD.shape[2]
    q = q_THGD.permute(1, 2, 0, 3)
    k = k_LHD.transpose(0, 1)[:, None].expand(-1, per_head, -1, -1)
    v = v_LHD.transpose(0, 1)[:, None].expand(-1, per_head, -1, -1)
    if not causal or tokens in (1, length):
        is_causal = causal and tokens > 1
        o[:] = _tokens_first(scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scaling))
        return
    for start in range(0, tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, tokens)
        seen = length - tokens + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool).tril(seen - (stop - start))
        part = scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scaling
        )
        o[start:stop] = _tokens_first(part)


def _tokens_first(output_HGTD: torch.Tensor) -> torch.Tensor:
    return output_HGTD.permute(2, 0, 1, 3).flatten(1, 2)
