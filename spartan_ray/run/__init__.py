"""A run from its configuration to its folder: the loop, checkpoints, records, storage, resume and replay.

Here are the configuration and its presets, the driver and its supervisor, and everything that reads or writes a single
run folder. Command-line parsing, reports and studies belong in `cli`, `report` and `study`; the mathematics of training
and evolution belong in `vision` and `engine`."""
