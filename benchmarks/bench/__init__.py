"""`scripts/bench`: measures the evaluator against this machine's limits and peers, and simulates larger clusters.

Only measurements, their tables and pictures belong here; the package does not import it."""
