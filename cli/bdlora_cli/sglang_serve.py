"""``sglang serve MODEL --model-type bdlora``: `launch` as a backend of SGLang's own command.

SGLang's seam: the entry point group ``sglang.serve_backends`` (``sglang.cli.serve_backends``).
"""

import os
import sys

from sglang.cli.serve_backends import ServeBackend, ServeRequest


def backend() -> ServeBackend:
    """The backend, which takes what ``bdlora launch`` takes; chosen by its name alone, never for a model."""
    return ServeBackend(api_version=1, run=_run)


def _run(request: ServeRequest) -> None:
    # Not in this process: SGLang has chosen its platform in it.
    os.execv(sys.executable, [sys.executable, "-m", "bdlora_cli.main", "launch", *request.argv])
