#!/bin/sh
# Test, tune and measure the kernels on a machine with a GPU, in under ten minutes; nobody needs to watch.
# It needs torch, Triton, NumPy, requests, pytest, pytest-timeout and SGLang, whose kernels are the baselines: without
# them it ends at once. FlashInfer's kernels are measured where they can be imported.
# Usage: perf/measure_on_gpu.sh OUTPUT_FOLDER, then: bdlora perf kernels --raw OUTPUT_FOLDER --output REPORT_FOLDER
# A step that fails or runs out of time does not keep the next one from running; the exit code is that of the tests.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="kernels:perf:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
configurations=kernels/bdlora_kernels/launch_configurations

if ! python3 -c 'import bdlora_perf.kernels.sglang_contenders' >"$out/sglang.log" 2>&1; then
    echo "SGLang's kernels cannot be imported, expected SGLang 0.5.23: nothing is measured. $(tail -n 1 "$out/sglang.log")"
    exit 1
fi
capability=$(python3 -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))')
# What will be tuned and measured is compiled by the processor's cores meanwhile.
timeout 325 python3 -m bdlora_perf.kernels.compile_ahead --capability "$capability" >"$out/compile.log" 2>&1 &
compiler=$!

# Most of the tests' time is the compiler's: in several processes where pytest-xdist is installed.
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")
# shellcheck disable=SC2086
timeout 140 python3 -m pytest -q -p no:cacheprovider $workers tests/kernels/test_triton_kernels.py \
    tests/kernels/test_triton_graphs.py tests/kernels/test_triton_fully_sharded.py >"$out/tests.log" 2>&1
tests=$?
tail -n 15 "$out/tests.log"

file=sm_$capability.json
timeout 185 python3 -m bdlora_perf.kernels.tune --output "$out/$file" --minutes 2.5 >"$out/tune.log" 2>&1
tail -n 15 "$out/tune.log"
if [ -f "$out/$file" ]; then mkdir -p "$configurations" && cp "$out/$file" "$configurations/$file"; fi

# Compiling beside the measurement would disturb it.
kill "$compiler" 2>/dev/null
wait "$compiler" 2>/dev/null
tail -n 1 "$out/compile.log"
# Clocks and temperature, once a second: a card that slows down shows it here.
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv -l 1 >"$out/clocks.csv" 2>&1 &
clocks=$!
timeout 220 python3 -m bdlora_perf.kernels.measure --output "$out" --minutes 3.3 >"$out/measure.log" 2>&1
kill "$clocks" 2>/dev/null
tail -n 40 "$out/measure.log"
exit $tests
