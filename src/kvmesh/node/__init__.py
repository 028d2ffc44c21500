"""The node process and the engine's handle on it."""
