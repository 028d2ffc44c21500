"""`kvmesh doctor`: checks a machine and a running cluster, and says what would make sharing fail before it does.

    findings   what a check finds: ok, warning, problem or skipped, with one sentence and what to do
    situation  what all checks look at: configuration, environment, the controller's answers
    run        all checks, in order

and one file per subject:

    setup      the configuration file, vLLM, kvmesh and their versions
    ports      ports of this instance: free, or taken by whom
    addresses  what this instance tells its peers to connect to
    limits     locked memory, descriptors, cgroup and host memory, against the pool
    shm        /dev/shm, against the pool
    rdma       NIXL, RDMA devices and UCX's variables
    sockets    the controller's control sockets and the cluster key
    redis      the Redis directory
    members    members as the controller sees them: silent ones, full pools, lost inventories
    formats    members that cannot share KV, and by which field
    peers      a connection to every member's peer port, from here
    misses     what requests have missed, by reason
    clock      this machine's clock beside the controller's

A check is a function from a `Situation` to findings. It reads and connects, changes nothing, and ends by itself:
whatever it asks has a time-out.
"""

from kvmesh.doctor.findings import Finding, Level
from kvmesh.doctor.run import examine
from kvmesh.doctor.situation import Situation, look

__all__ = ["Finding", "Level", "Situation", "examine", "look"]
