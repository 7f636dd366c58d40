"""Evolution of any network by any fitness: no Ray, no images, no configuration files."""
