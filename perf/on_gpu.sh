# shellcheck shell=sh
# What the scripts for a machine with a GPU share: to be sourced with the output folder as $1, which it makes.
# Sets $out, and goes to the top of this repository. Ends with exit code 103 and a word where there is nothing to try.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 103
cd "$(dirname "$0")/.." || exit 103
export PYTHONPATH="kernels:perf:cli:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET

python3 - >"$out/machine.log" 2>&1 <<'PYTHON'
import importlib
import sys

for name in ("sglang", "peft", "transformers", "triton", "torch"):
    try:
        module = importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{name}: found {type(error).__name__} ({error}), expected what pip install -e '.[serve,perf]' brings")
    print(name, module.__version__)
import torch

if not torch.cuda.is_available():
    sys.exit("torch: found no CUDA device, expected a GPU: nothing is measured")
print(torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability())
PYTHON
there=$?
tail -n 6 "$out/machine.log"
[ $there -eq 0 ] || exit 103
