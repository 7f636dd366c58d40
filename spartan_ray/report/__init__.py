"""Tables and pictures of run folders."""
