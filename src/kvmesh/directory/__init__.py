"""A node's connection to a directory."""
