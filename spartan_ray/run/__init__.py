"""Runs: configuration, the loop, what it leaves in a folder."""
