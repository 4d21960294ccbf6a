"""How long a prefill and a decode step take inside running servers, point by point, now and in another checkout."""
