"""``bdlora perf serve``: throughput and latency of serving many adapters, ours beside others, asked by one client.

``workload`` and ``trace`` say what is asked of a server, ``systems`` who is compared; ``adapters`` makes the files,
``servers`` and ``vllm`` start what is measured, ``load`` sends the requests of one run, ``metrics`` weighs them, and
``run`` puts the runs in order.
"""
