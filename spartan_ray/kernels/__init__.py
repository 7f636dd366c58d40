"""Noise kernels: `descend` and `accumulate` fused with the generator, one file a device type."""
