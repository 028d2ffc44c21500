"""For all tests: Hypothesis tries the same examples in every run, and lets them take their time.

`pytest --hypothesis-profile=default tests/fuzz` looks elsewhere each time.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same-each-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-each-time")
