"""Noise as a function of a 64-bit seed: its definition, and the kernels that generate and use it in one pass.

The definition, the kernels for each kind of device, and the check of a kernel live here. Networks, strategies and Ray
must not: apart from `spartan_ray.errors`, this package imports nothing from the rest of `spartan_ray`.
"""
