"""Messages and frames. The docstring of each module is the specification of its protocol."""
