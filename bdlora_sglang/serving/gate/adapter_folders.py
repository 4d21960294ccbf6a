"""Where adapters may be loaded from while the server runs."""

from collections.abc import Sequence
from pathlib import Path

from bdlora_sglang.adapter.locate import adapter_folder, is_repo_id
from bdlora_sglang.errors import BDLoRAError


class AdapterFolders:
    """Finds the folder of an adapter that a client names.

    Args:
        roots: only below these; None allows every folder of the machine.
        from_hub: whether a Hugging Face repo id is downloaded.
    """

    def __init__(self, roots: Sequence[str] | None, from_hub: bool) -> None:
        self._roots = None if roots is None else [Path(root).resolve() for root in roots]
        self._from_hub = from_hub

    def find(self, path: str) -> Path:
        """The folder with all links resolved. It can take long where it is downloaded.

        Raises:
            BDLoRAError: no such folder, or one that is not allowed: a client cannot tell which.
        """
        try:
            folder = Path(path).resolve()
            if folder.is_dir() and self._allows(folder):
                return folder
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
            pass
        if self._from_hub and is_repo_id(path):
            return adapter_folder(path)
        raise BDLoRAError(
            f"lora_path: found {path!r}, expected an adapter folder below --adapter-root"
            f"{' or a Hugging Face repo id' if self._from_hub else ' (--adapters-from-hub allows repo ids)'}"
        )

    def _allows(self, folder: Path) -> bool:
        if self._roots is None:
            return True
        files = [folder, *(file.resolve() for file in folder.iterdir() if file.is_symlink())]
        return all(any(file.is_relative_to(root) for root in self._roots) for file in files)
