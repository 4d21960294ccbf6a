"""`bdlora perf swap`: loading adapters into running servers, and what that costs the requests beside it."""
