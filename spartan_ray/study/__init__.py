"""Studies: grids of runs with several seeds, and populations of several sizes on one parent, with their statistics.

Plans, result rows, intervals, tables and pictures over many runs belong here. Training and recording a single run
belongs to `spartan_ray.run`, and the report of single runs to `spartan_ray.report`."""
