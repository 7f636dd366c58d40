"""The command line, `spartan`."""
