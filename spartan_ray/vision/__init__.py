"""Image classification: data sets, networks, gradient training, and a fitness on images for the engine.

This is one application of the engine; the engine does not depend on it. Nothing here may import Ray or write a run
folder, and scoring needs no pydantic: workers import these modules."""
