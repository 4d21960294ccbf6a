"""Keeps a slot from being overwritten while a forward that was launched still reads it.

Copies on the stream of the forwards come after them by themselves. SGLang's loader of ``--enable-lora-overlap-loading``
copies on a stream of its own, which waits for no forward: a request may end, and its adapter be evicted, while the
forward that made its last token is still under way.
"""

from collections.abc import Iterable
from typing import Any

import torch


class SlotGuard:
    """Events of forwards, by the slots that they read. On a CPU, where nothing is asynchronous, it does nothing."""

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        """``streams`` has ``Event`` and ``current_stream``; by default the device's own module."""
        if streams is None and device.type != "cpu":
            streams = torch.get_device_module(device)
        self._streams = streams
        self._reading: frozenset[int] = frozenset()
        self._last_read: dict[int, Any] = {}

    def read_by_next_forward(self, slots: Iterable[int]) -> None:
        """Say which slots the forward that will be launched next reads."""
        self._reading = frozenset(slots)

    def forward_launched(self) -> None:
        """Call on the stream of a forward, after it."""
        if self._streams is None or not self._reading:
            return
        event = self._streams.Event()
        event.record(self._streams.current_stream())
        self._last_read.update(dict.fromkeys(self._reading, event))

    def before_write(self, slot: int) -> None:
        """Let the current stream wait for the last forward that reads ``slot``."""
        event = self._last_read.pop(slot, None)
        if event is not None:
            self._streams.current_stream().wait_event(event)
