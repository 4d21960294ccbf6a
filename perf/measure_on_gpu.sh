#!/bin/sh
# Test, tune and measure the kernels on a machine with a GPU, in under ten minutes; nobody needs to watch.
# It needs torch, Triton, NumPy, requests, pytest and pytest-timeout; SGLang's and FlashInfer's kernels are measured where
# they can be imported.
# Usage: perf/measure_on_gpu.sh OUTPUT_FOLDER, then: bdlora perf kernels --raw OUTPUT_FOLDER --output REPORT_FOLDER
# A step that fails or runs out of time does not keep the next one from running; the exit code is that of the tests.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="kernels:perf:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
configurations=kernels/bdlora_kernels/launch_configurations

# Most of the tests' time is the compiler's: in several processes where pytest-xdist is installed.
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
timeout 140 python3 -m pytest -q -p no:cacheprovider $workers tests/kernels/test_triton_kernels.py \
    tests/kernels/test_triton_graphs.py >"$out/tests.log" 2>&1
tests=$?
tail -n 15 "$out/tests.log"

file=sm_$(python3 -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))').json
timeout 185 python3 -m bdlora_perf.kernels.tune --output "$out/$file" --minutes 2.5 >"$out/tune.log" 2>&1
tail -n 15 "$out/tune.log"
if [ -f "$out/$file" ]; then mkdir -p "$configurations" && cp "$out/$file" "$configurations/$file"; fi

python3 -c 'import bdlora_perf.kernels.sglang_contenders' >"$out/sglang.log" 2>&1 ||
    echo "SGLang's kernels cannot be imported, and are not measured: $(tail -n 1 "$out/sglang.log")"
# Clocks and temperature, once a second: a card that slows down shows it here.
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv -l 1 >"$out/clocks.csv" 2>&1 &
clocks=$!
timeout 220 python3 -m bdlora_perf.kernels.measure --output "$out" --minutes 3.3 >"$out/measure.log" 2>&1
kill "$clocks" 2>/dev/null
tail -n 40 "$out/measure.log"
exit $tests
