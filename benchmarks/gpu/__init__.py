"""`scripts/gpu`: tests and measures one GPU.

Measurements use only the parts of the package that score and train: no Ray and no pydantic. Only the tests and the
whole runs need them."""
