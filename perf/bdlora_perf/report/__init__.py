"""Reports of ``bdlora perf``: one JSON file with every raw figure, and the pages that are worked out from it."""
