"""The `spartan` command line: its commands and flags, the display of progress, and the start of Ray.

Commands parse their arguments here and call `run`, `study` and `report`. `from_python.py` is `spartan_ray.train`.
Training, scoring, run folders and tables do not belong here."""
