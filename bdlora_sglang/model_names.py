"""Short names of base models, for the command line."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from bdlora_sglang.errors import BDLoRAError

MODEL_NAMES: dict[str, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}

_REPO_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_URL = re.compile(r"^\w+://")


def resolve_model(model: str) -> str:
    """The path or repo id that ``model`` stands for.

    A path and a URL (which SGLang's own loaders read) stay as they are.

    Raises:
        BDLoRAError: neither a short name, a folder with a config, nor a repo that can be reached or is in the cache.
    """
    model = MODEL_NAMES.get(model.lower(), model)
    folder = Path(model)
    if folder.exists():
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise BDLoRAError(f"--model {model}: found a folder without config.json, expected a Hugging Face model")
        return model
    if _URL.match(model):
        return model
    if model.startswith(".") or not _REPO_ID.match(model):
        raise BDLoRAError(
            f"--model {model}: found no such folder, expected a path, a Hugging Face repo id or a short name "
            f"({', '.join(MODEL_NAMES)})"
        )
    try:
        hf_hub_download(model, "config.json")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BDLoRAError(f"--model {model}: found no such folder and no such repo ({reason}), expected one") from error
    return model
