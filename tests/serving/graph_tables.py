"""A scheduler whose batches are laid out as for captured CUDA graphs, and which says where each batch was laid out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdlora_sglang.serving.scheduler import BDLoRAScheduler

# The tests' variable: a file that gets a line a batch, "decode", "prefill" or "eager".
TABLES_FILE = "BDLORA_TEST_TABLES_FILE"
# Larger prefills are eager, as they are beside real graphs.
MAX_PREFILL_TOKENS = 8


class GraphTablesScheduler(BDLoRAScheduler):
    """SGLang's two calls before it captures, which choose the tables at fixed addresses; nothing is captured."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager = self.tp_worker.model_runner.lora_manager
        manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=16, num_tokens_per_req=1)
        manager.init_prefill_cuda_graph_batch_info(max_num_tokens=MAX_PREFILL_TOKENS)
        kernels = manager.kernels
        lay_out = kernels.segments

        def recorded(slots: Sequence[int], lengths: Sequence[int], graph: str | None) -> Any:
            with Path(os.environ[TABLES_FILE]).open("a") as file:
                file.write(f"{graph or 'eager'}\n")
            return lay_out(slots, lengths, graph)

        kernels.segments = recorded
