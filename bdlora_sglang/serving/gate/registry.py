"""The registry of loaded adapters, in which an adapter in use cannot be unloaded."""

import asyncio

from sglang.srt.lora.lora_registry import LoRARegistry


class CountedRegistry(LoRARegistry):
    """SGLang's, but looked up and counted as used in one step.

    SGLang counts after it has let go of the registry's lock. An adapter that is unloaded in between is gone from the
    ranks when the request arrives there, and they end.
    """

    async def acquire(self, lora_name: str | list[str | None]) -> str | list[str | None] | None:
        """The id of each adapter, each counted once more as used; raises `ValueError` when one is not loaded."""
        names = [lora_name] if isinstance(lora_name, str) else lora_name
        async with self._registry_lock.writer_lock:
            missing = [name for name in names if name is not None and name not in self._registry]
            if missing:
                raise ValueError(f"lora_path: found {missing[0]!r}, expected a loaded adapter")
            ids = [None if name is None else self._registry[name].lora_id for name in names]
            for name in names:
                if name is not None:
                    self._registry.move_to_end(name)
            await asyncio.gather(*(self._counters[i].increment(notify_all=False) for i in ids if i is not None))
        return ids[0] if isinstance(lora_name, str) else ids
