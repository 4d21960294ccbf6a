"""Why a rank failed at its start, handed to the process that waits for it.

SGLang's own ranks signal their parent, which kills itself: the reason then stands somewhere above in the log.
"""

import multiprocessing
from typing import Any

from bdlora_sglang.errors import BDLoRAError

# A pipe takes up to so many bytes at once, whoever else writes. It needs no lock, which would outlive a killed rank.
_MOST_BYTES = 4000


class StartFailures:
    """A pipe that travels to the ranks with the function that they run."""

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)

    def __getstate__(self) -> Any:
        return self._writer

    def __setstate__(self, writer: Any) -> None:
        self._writer = writer

    def put(self, error: Exception) -> None:
        """Called in the rank that failed."""
        self._writer.send_bytes((str(error) or repr(error)).encode()[:_MOST_BYTES])

    def reason(self, error: Exception) -> BDLoRAError:
        """The first reason that a rank has given; else ``error``, which the start has ended with."""
        if self._reader.poll():
            return BDLoRAError(self._reader.recv_bytes().decode(errors="replace"))
        return error if isinstance(error, BDLoRAError) else BDLoRAError(str(error) or repr(error))
