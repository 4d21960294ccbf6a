"""Nothing of SGLang is assigned to or replaced."""

import subprocess
import sys

_IMPORT_US = """
import sys, types
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.lora.lora_manager
from tests.serving.snapshot import changed, sglang_objects
import sglang
before = sglang_objects()
assert len(before) > 10_000, len(before)
import bdlora_sglang.serving.process, bdlora_sglang.serving.launch, bdlora_cli.main
after = sglang_objects()
assert changed(before, after) == [], changed(before, after)

# Would a patch be seen? Tried on a stand-in that is only named like SGLang, which itself is never assigned to.
stand_in = types.ModuleType("sglang_stand_in")
stand_in.function = lambda: None
stand_in.Class = type("Class", (), {"method": lambda self: None, "__module__": "sglang_stand_in"})
sys.modules["sglang_stand_in"] = stand_in
before = sglang_objects()
stand_in.function = lambda: None
stand_in.Class.method = lambda self: None
assert changed(before, sglang_objects()) == ["sglang_stand_in.Class.method", "sglang_stand_in.function"]
"""


def test_importing_us_changes_nothing_of_sglang() -> None:
    result = subprocess.run([sys.executable, "-c", _IMPORT_US], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
