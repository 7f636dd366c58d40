"""Evolution of any network by any fitness.

Populations, strategies, the scoring of members on one device and the optimizer live here. Ray, images and configuration
files must not. Below it are only `noise`, the package's errors, and the reading of names.
"""
