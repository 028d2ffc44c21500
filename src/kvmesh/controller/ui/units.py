"""Numbers as people read them: the page uses what the command line uses."""

from kvmesh.units import NOTHING, age, count, duration, listed, rate, share, size, some

__all__ = ["NOTHING", "age", "count", "duration", "listed", "rate", "share", "size", "some"]
