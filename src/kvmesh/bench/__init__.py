"""Measuring: benchmarks, the demo, and the clusters they run on."""
