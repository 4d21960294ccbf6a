#!/bin/sh
# Try the engine on a machine with one GPU, in ten minutes; nobody needs to watch.
# It needs what `pip install -e '.[serve,perf]'` and `pip install peft` bring, and nothing from the network.
# Usage: perf/try_engine_on_gpu.sh OUTPUT_FOLDER; OUTPUT_FOLDER/checks.json says how each check went.
# A step that fails or runs out of time does not keep the next one from running; the exit code is the number of checks
# that failed (of perf/try_engine.py), or more than 100 where that did not come to its end: 103 where SGLang or a GPU is
# missing.
# shellcheck source=perf/on_gpu.sh
. "$(dirname "$0")/on_gpu.sh"

timeout 360 python3 perf/try_engine.py "$out" >"$out/engine.log" 2>&1
checks=$?
grep -E ': (passed|FAILED)' "$out/engine.log"
grep -E 'BD-LoRA|slots of' "$out/engine.log"

timeout 200 python3 -m bdlora_cli.main perf swap --tp 1 --rank 8 --rank 64 --loads 20 --rounds 1 --force \
    --output "$out/swap" --work "$out/work" >"$out/swap.log" 2>&1
tail -n 30 "$out/swap.log"
exit $checks
