"""Where there is no GPU, the tests of the Triton kernels run in Triton's interpreter.

They run in a process of their own: TRITON_INTERPRET counts when Triton is first imported, and other tests import it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_support import RUNNABLE

FOLDER = Path(__file__).parent


@pytest.mark.skipif(RUNNABLE, reason="they run in this process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    files = [str(FOLDER / f"test_triton_{name}.py") for name in ("kernels", "fully_sharded")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=FOLDER.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    print(done.stdout[-4000:])
    assert done.returncode == 0, "the output above says which"
    assert " passed" in done.stdout
