"""The executor on Ray: a pool of workers that fail, hang, come and go."""
