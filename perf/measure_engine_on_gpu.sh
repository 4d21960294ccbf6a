#!/bin/sh
# Measure the whole engine on a machine with one GPU, in ten minutes; nobody needs to watch.
# One rank of Llama-3.1-70B at TP 8 is a model of its own (17 GB of random weights): the base model, BD-LoRA of rank 2r
# and 4r as that rank holds it (local rank r/4 and r/2), and SGLang's own triton_v2 and csgmv with plain LoRA of rank r.
# Collectives are left out. 32 adapters, each request in flight with another; CUDA graphs as SGLang sets them.
# It needs what `pip install -e '.[serve,perf]'` and `pip install peft` bring, and nothing from the network.
# Usage: perf/measure_engine_on_gpu.sh OUTPUT_FOLDER [FLAGS of bdlora perf serve, in place of these]
# The report is written after each run, so that what is done when time is over is kept: the most telling comes first.
# LoRA's tax is in the tables of the speed-up over the base model: of a decode step in TPOT, of a prefill in TTFT at
# concurrency 1; the tables before them compare with SGLang's own.
# Exit code 0 when all was measured, 103 where SGLang or a GPU is missing.
# shellcheck source=perf/on_gpu.sh
. "$(dirname "$0")/on_gpu.sh"
shift

# Clocks and temperature, once a second: a card that slows down shows it here.
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv -l 1 >"$out/clocks.csv" 2>&1 &
clocks=$!
# An interrupt ends the servers and keeps what is measured.
timeout -s INT -k 20 570 python3 -m bdlora_cli.main perf serve \
    --model llama-3.1-70b --one-rank-of 8 --systems base,bd-2r,sglang-triton-v2,sglang-csgmv,bd-4r --rank 32 \
    --adapters 32 --distribution distinct --concurrency 1 --concurrency 8 --concurrency 32 --waves 2 \
    --input-len 1024 --output-len 64 --rounds 3 --rounds-a-start 3 \
    --output "$out" --work "$out/work" --force "$@" >"$out/serve.log" 2>&1
measured=$?
kill "$clocks" 2>/dev/null
tail -n 60 "$out/serve.log"
exit $measured
