"""Noise as a function of a 64-bit seed: the contract, and the kernels that fuse it with what is done with it."""
