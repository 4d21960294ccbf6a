"""``bdlora perf serve``: throughput and latency of serving many adapters, measured with SGLang's own load generator.

``workload`` says what is asked of a server, ``systems`` who is compared; ``adapters`` makes the files, ``servers``
starts what is measured, ``load`` runs SGLang's generator once, and ``sweep`` puts the runs in order.
"""
