"""Measures the evaluator against the machine's own limit, and what it costs on more machines than there are."""
