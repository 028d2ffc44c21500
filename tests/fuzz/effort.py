"""How long the fuzz tests try. Quick and the same every time, unless `KVMESH_FUZZ_EXAMPLES` asks for so many examples
of each, which are then new ones at every run.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("KVMESH_FUZZ_EXAMPLES")
_HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzz(quick_examples: int) -> settings:
    """A decorator for a test that takes about `quick_examples` examples in a second or two."""
    if _EXAMPLES:
        return settings(max_examples=int(_EXAMPLES), deadline=None, suppress_health_check=_HEALTH)
    return settings(
        max_examples=quick_examples, derandomize=True, database=None, deadline=None, suppress_health_check=_HEALTH
    )
