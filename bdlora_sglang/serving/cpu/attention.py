"""Attention on the CPU: SGLang's torch-native backend, with a compiled loop for decode and larger products for prefill.

Shape suffixes: L tokens of a request, H KV heads, G query heads of a KV head, D head size, T tokens of a batch.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from torch.nn.functional import scaled_dot_product_attention

from bdlora_sglang.serving.cpu.decode_attention import attend, can_attend
from bdlora_sglang.serving.cpu.recording import one_step

# Queries behind a cached prefix are computed so many at a time: the mask of a call is bounded, whatever the chunk size.
_QUERY_BLOCK = 512


class CPUAttention(TorchNativeAttnBackend):
    """Takes over decoding and prefill of decoder layers; sliding windows, cross-attention and other forwards are
    SGLang's (``TorchNativeAttnBackend``)."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._longest: int | None = None
        self._locations: list[torch.Tensor] | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._longest = self._locations = None
        if forward_batch.encoder_lens is not None or self.use_sliding_window_kv_pool:
            return
        if forward_batch.forward_mode.is_decode():
            self._longest = int(forward_batch.seq_lens.max())
        elif forward_batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED):
            table = self.req_to_token_pool.req_to_token
            pools, lengths = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
            self._locations = [table[pool, :length] for pool, length in zip(pools, lengths, strict=True)]

    @one_step
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
        if self._longest is None or not _is_plain(layer) or not can_attend(q, *self._cached(layer)):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        heads = layer.tp_k_head_num
        return attend(
            q.reshape(-1, heads, layer.tp_q_head_num // heads, layer.qk_head_dim),
            *self._cached(layer),
            *(self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices),
            *(forward_batch.seq_lens, self._longest, layer.scaling),
        )

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
