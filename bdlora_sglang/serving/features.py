"""What of SGLang meets LoRA, and whether it is served: one table for the checks before a start and for the README.

``python -m bdlora_sglang.serving.features README.md`` brings the README up to date.
"""

import sys
from pathlib import Path

from bdlora_sglang.serving.feature import Feature, Status, markdown_table

BEGIN, END = "<!-- SGLang's features -->", "<!-- end of SGLang's features -->"

_SPLIT_ROWS = "a layer sees a part of the batch's rows, LoRA's tables index all of them"
_TWO_STREAMS = "two streams would share LoRA's scratch memory"
_LAUNCHER = "it starts SGLang's own processes, in which there is no BD-LoRA"
_EXPERTS = "PEFT has no such format; what PEFT has on experts is served on the CPU"
_UNTESTED = "never tried with BD-LoRA"
_SGL_KERNEL = "it runs SGLang's GPU kernels"
_REFUSED = "test_features.py::test_what_is_not_served_is_refused_by_name"
_ON_CPU = "test_features.py::test_what_needs_a_gpu_is_refused_on_the_cpu"
_BUSY = "test_served_features.py::test_mixed_chunks_fifo_eviction_drain_and_sessions"
_SWAPPED = "test_served_features.py::test_new_base_weights_under_loaded_adapters"

SERVED, NEEDS_GPU, REFUSED = Status.SERVED, Status.NEEDS_GPU, Status.REFUSED
FEATURES: tuple[Feature, ...] = (
    Feature(
        "adapters loaded and unloaded on the way",
        SERVED,
        "api/test_stress.py",
        requests="`/load_lora_adapter`, `/load_lora_adapter_from_tensors`, `/unload_lora_adapter`",
    ),
    Feature(
        "copying adapters beside the forward",
        SERVED,
        "test_parallel_launches.py::test_two_nodes",
        off={"enable_lora_overlap_loading": False},
    ),
    Feature(
        "several nodes", SERVED, "test_parallel_launches.py::test_two_nodes", "tensor parallelism", off={"nnodes": 1}
    ),
    Feature(
        "data-parallel replicas",
        SERVED,
        "test_parallel_launches.py::test_data_parallel_replicas",
        "adapters are given at the start, SGLang loads none on the way",
        off={"dp_size": 1},
    ),
    Feature("eviction from the slots", SERVED, _BUSY, off={"lora_eviction_policy": "lru"}),
    Feature("draining adapters for those that wait", SERVED, _BUSY, off={"lora_drain_wait_threshold": 0.0}),
    Feature("prefill and decode in one batch", SERVED, _BUSY, off={"enable_mixed_chunk": False}),
    Feature("streaming sessions", SERVED, _BUSY, off={"enable_streaming_session": False}),
    Feature(
        "new base weights under loaded adapters",
        SERVED,
        _SWAPPED,
        requests="`/update_weights_from_disk`, `/update_weights_from_tensor`",
    ),
    Feature(
        "MoE experts",
        SERVED,
        "test_experts.py::test_tokens_and_logprobs_equal_peft",
        "adapters on experts and routers on the CPU alone; on a GPU they are refused by name",
        requests="adapters with `target_parameters`, or on `experts.N.gate_proj` and its like",
    ),
    Feature(
        "vision-language models",
        SERVED,
        "test_families.py::test_images",
        "adapters on the language model, for text and images; those on a vision tower are refused by name",
        requests="the model",
    ),
    Feature(
        "refusing adapters with tensors that would be skipped",
        SERVED,
        "test_served_features.py::test_strict_loading_refuses_what_would_be_skipped",
        off={"lora_strict_loading": False},
    ),
    Feature(
        "JSON schemas, regular expressions, tools",
        SERVED,
        "api/test_grammar.py",
        "on the CPU by xgrammar or outlines",
        off={"grammar_backend": "none"},
    ),
    Feature(
        "n-gram speculation",
        NEEDS_GPU,
        _ON_CPU,
        f"{_SGL_KERNEL}; not run yet",
        on={"speculative_algorithm": ("NGRAM",)},
    ),
    Feature(
        "draft models",
        NEEDS_GPU,
        _ON_CPU,
        f"{_SGL_KERNEL}; not run yet; the draft runs without adapters",
        on={"speculative_algorithm": ("EAGLE", "EAGLE3", "DFLASH")},
    ),
    Feature(
        "hierarchical cache",
        NEEDS_GPU,
        _ON_CPU,
        "it pins host memory; not run yet; an adapter's prefixes are its own",
        off={"enable_hierarchical_cache": False},
    ),
    Feature(
        "deterministic inference",
        NEEDS_GPU,
        _ON_CPU,
        f"{_SGL_KERNEL}; not run yet; ours are batch-invariant then",
        off={"enable_deterministic_inference": False},
    ),
    Feature(
        "sleep and wake",
        NEEDS_GPU,
        _ON_CPU,
        "it moves GPU memory; not run yet; adapters' slots stay",
        off={"enable_memory_saver": False},
    ),
    Feature(
        "quantised base models",
        NEEDS_GPU,
        _ON_CPU,
        f"{_SGL_KERNEL}; not run yet",
        requests="`--quantization`, or the model's `config.json`",
    ),
    Feature("two-batch overlap", REFUSED, _REFUSED, _SPLIT_ROWS, off={"enable_two_batch_overlap": False}),
    Feature("single-batch overlap", REFUSED, _REFUSED, _TWO_STREAMS, off={"enable_single_batch_overlap": False}),
    Feature("PD multiplexing", REFUSED, _REFUSED, _TWO_STREAMS, off={"enable_pdmux": False}),
    Feature("PD disaggregation", REFUSED, _REFUSED, _UNTESTED, off={"disaggregation_mode": "null"}),
    Feature("DP attention", REFUSED, _REFUSED, _SPLIT_ROWS, off={"attn_dp_size": 1}),
    Feature(
        "context parallelism",
        REFUSED,
        _REFUSED,
        _SPLIT_ROWS,
        off={"attn_cp_size": 1, "dcp_size": 1, "enable_prefill_cp": False},
    ),
    Feature(
        "scattered rows",
        REFUSED,
        _REFUSED,
        _SPLIT_ROWS,
        off={"enable_attn_tp_input_scattered": False, "enable_layernorm_sp": False},
    ),
    Feature(
        "pipeline parallelism",
        REFUSED,
        _REFUSED,
        "pipeline parallelism is not supported",
        off={"pp_size": 1},
        without_lora=True,
    ),
    Feature(
        "expert parallelism",
        REFUSED,
        _REFUSED,
        _UNTESTED,
        off={"ep_size": 1, "moe_dp_size": 1, "dwdp_size": 1, "moe_a2a_backend": "none", "enable_eplb": False},
    ),
    Feature(
        "experts' adapters, as SGLang has them",
        REFUSED,
        _REFUSED,
        _EXPERTS,
        off={"experts_shared_outer_loras": None, "lora_use_virtual_experts": False},
    ),
    Feature(
        "chunks of SGLang's csgmv backend",
        REFUSED,
        _REFUSED,
        "BD-LoRA's kernels have no such chunks",
        off={"max_lora_chunk_size": 16},
    ),
    Feature(
        "other speculation",
        REFUSED,
        _REFUSED,
        _UNTESTED,
        on={"speculative_algorithm": ("STANDALONE", "DSPARK", "FROZEN_KV_MTP", "UNO")},
    ),
    Feature("torch.compile", REFUSED, _REFUSED, "it cannot trace LoRA's tables", off={"enable_torch_compile": False}),
    Feature(
        "diffusion language models", REFUSED, _REFUSED, "SGLang turns LoRA off there", off={"dllm_algorithm": None}
    ),
    Feature(
        "whole-model kernels",
        REFUSED,
        _REFUSED,
        "they compute layers without asking LoRA",
        off={"enable_nvidia_megakernel": False, "enable_amd_monokernel": False},
    ),
    Feature(
        "weights kept on the host", REFUSED, _REFUSED, _UNTESTED, off={"cpu_offload_gb": 0, "offload_group_size": -1}
    ),
    Feature(
        "other prefix caches",
        REFUSED,
        _REFUSED,
        _UNTESTED,
        off={
            "enable_lmcache": False,
            "enable_flexkv": False,
            "radix_cache_backend": None,
            "enable_unified_cache_external_linker": False,
            "hicache_storage_backend": None,
        },
    ),
    Feature(
        "several tokenizer processes",
        REFUSED,
        _REFUSED,
        "each keeps names of adapters of its own, and requests are not checked there",
        off={"tokenizer_worker_num": 1},
        without_lora=True,
    ),
    Feature(
        "the server in Rust",
        REFUSED,
        _REFUSED,
        "requests are not checked there",
        off={"SGLANG_RUST_SERVER": False},
        without_lora=True,
    ),
    Feature(
        "gRPC",
        REFUSED,
        _REFUSED,
        "requests are not checked there",
        off={"smg_grpc_mode": False, "grpc_mode": False, "grpc_port": None},
        without_lora=True,
    ),
    Feature("Ray", REFUSED, _REFUSED, _LAUNCHER, off={"use_ray": False}, without_lora=True),
    Feature(
        "multimodal encoders apart",
        REFUSED,
        _REFUSED,
        _LAUNCHER,
        off={"encoder_only": False, "language_only": False},
        without_lora=True,
    ),
    Feature(
        "ROCm",
        REFUSED,
        _REFUSED,
        "the kernels are tested for NVIDIA's GPUs",
        off={"is_hip": False},
        requests="an AMD GPU",
    ),
    Feature(
        "other devices",
        REFUSED,
        _REFUSED,
        "the kernels are tested for NVIDIA's GPUs",
        on={"device": ("xpu", "hpu", "npu", "mps", "musa")},
    ),
)


def write_into(readme: Path) -> None:
    """Put the table between its two marks in a Markdown file."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    readme.write_text(f"{before}{begin}\n{markdown_table(FEATURES)}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_into(Path(sys.argv[1]))
