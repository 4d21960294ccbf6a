"""How large batches get, by SGLang's arguments."""

from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec, max_prefill_buffer_tokens

from bdlora_sglang.serving.kernels import BatchLimits


def batch_limits() -> BatchLimits:
    """Those of this process's published arguments (SGLang: ``init_lora_cuda_graph_moe_buffers`` counts alike)."""
    schedule = get_schedule()
    tokens_per_request = get_spec().speculative_num_draft_tokens or 1
    running = schedule.max_running_requests
    decode = 0
    if not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        decode = get_exec().graph.cuda_graph_config.decode.max_bs or 0
        if running is not None:
            decode = min(decode, max(1, running // get_parallel().attn_dp_size))
    prefill = max_prefill_buffer_tokens() or schedule.max_prefill_tokens or 0
    return BatchLimits(max(1, prefill, (running or 0) * tokens_per_request), decode * tokens_per_request)
