"""The processes that tests have started."""

from contextlib import suppress

import psutil


def servers() -> list[psutil.Process]:
    """Those of ``bdlora`` that run; what has ended and was not waited for does not count."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "bdlora_cli" in " ".join(child.cmdline()):
                found.append(child)
    return found
