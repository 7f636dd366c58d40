"""Image classification: a guest of the engine."""
