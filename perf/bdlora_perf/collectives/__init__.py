"""``bdlora perf collectives``: what the ranks send each other in one forward, counted, and what it takes, timed."""
