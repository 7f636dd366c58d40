"""The executor on Ray: a pool of workers that may fail, hang, join and leave.

Here are the pool, its dispatcher, the transports and relays, the worker actor, the placement on nodes, how a Ray is
joined or started, and the public `Population`. Nothing here may know images, training, run folders or reports:
import only from `engine`, `noise` and the modules at the top of the package."""
