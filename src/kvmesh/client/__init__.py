"""The controller's HTTP API, asked from outside: by the command line and by `kvmesh doctor`.

    api = ControllerApi(ControllerTarget.parse("localhost:9000"))
    members = api.get("/api/v1/instances", Instances)

`http` is the one place that talks HTTP; `answers`, `operations` and `explanations` have what is read out of the
answers; `moment` puts some of them together.
"""

from kvmesh.client.answers import (
    Departed,
    Difference,
    Fetch,
    Health,
    HitRates,
    Incompatibility,
    Instance,
    Instances,
    Lookup,
    Refusal,
    Statistics,
    Totals,
)
from kvmesh.client.http import ControllerApi, ControllerTarget

__all__ = [
    "ControllerApi",
    "ControllerTarget",
    "Departed",
    "Difference",
    "Fetch",
    "Health",
    "HitRates",
    "Incompatibility",
    "Instance",
    "Instances",
    "Lookup",
    "Refusal",
    "Statistics",
    "Totals",
]
