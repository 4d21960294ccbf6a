"""The segment kernels against others, on one GPU. `measure` and `tune` need torch, Triton and NumPy alone."""
