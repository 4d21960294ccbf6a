"""Nothing of SGLang is assigned to or replaced."""

import subprocess
import sys

_IMPORT_US = """
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.lora.lora_manager
from tests.serving.snapshot import changed, sglang_objects
import sglang
before = sglang_objects()
assert len(before) > 10_000, len(before)
import bdlora_sglang.serving.process, bdlora_sglang.serving.launch, bdlora_cli.main
after = sglang_objects()
assert changed(before, after) == [], changed(before, after)
sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter = lambda self: None
assert changed(after, sglang_objects()) != [], "the test does not see a patch"
"""


def test_importing_us_changes_nothing_of_sglang() -> None:
    result = subprocess.run([sys.executable, "-c", _IMPORT_US], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
