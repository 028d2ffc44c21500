"""The controller itself, and its members as it sees them."""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.client import Departed, Instance
from kvmesh.doctor.findings import CONTROLLER, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Cluster, Situation
from kvmesh.units import count, duration, share, size

FULL = 0.98
BEHIND_BYTES = 1 << 20
SETTLED_S = 10.0
"""A member that has been one for so long has sent its inventory."""


def controller(situation: Situation) -> Iterator[Finding]:
    """Does it answer, and is it well?"""
    if situation.cluster is None:
        if situation.cluster_error is None:
            yield skipped("controller.answers", CONTROLLER, "not asked: --offline")
            return
        error = situation.cluster_error
        yield problem("controller.answers", error.thing, error.found, error.hint)
        return
    health = situation.cluster.health
    yield ok("controller.answers", situation.cluster.url, f"up for {duration(health.uptime_s)}")
    for text in health.problems:
        yield problem("controller.health", situation.cluster.url, text, "restart it; the nodes register again")


def check(situation: Situation) -> Iterator[Finding]:
    """Who is there, who is silent, who has gone, and whose pool is full."""
    cluster = situation.cluster
    if cluster is None:
        return
    yield present(cluster)
    silent = [one for one in cluster.members.instances if one.state != "up"]
    for member in silent:
        yield heartbeat(member)
    if cluster.members.instances and not silent:
        latest_s = max(one.last_contact_age_s for one in cluster.members.instances)
        yield ok("member.heartbeat", CONTROLLER, f"all members were heard of in the last {duration(max(latest_s, 1))}")
    here = {one.instance_id for one in cluster.members.instances}
    for gone in cluster.members.departed:
        if gone.reason == "timeout" and gone.instance_id not in here:
            yield lost(gone)
    for member in cluster.members.instances:
        yield from pool(member)
        yield from trouble(member)


def present(cluster: Cluster) -> Finding:
    """Sharing takes two."""
    number = len(cluster.members.instances)
    if number == 0:
        advice = "start instances with controller_pull_url and controller_reply_url of this controller"
        return problem("member.present", CONTROLLER, "no instance is a member, so nothing is shared", advice)
    if number == 1:
        only = cluster.members.instances[0].instance_id
        advice = "start another one, or look at its log (`does not accept this node`, `directory`)"
        return warning("member.present", only, "the only member: there is nobody to share with", advice)
    return ok("member.present", CONTROLLER, f"{number} members")


def heartbeat(member: Instance) -> Finding:
    """A member that has been silent for longer than a heartbeat should take."""
    return problem(
        "member.heartbeat",
        member.instance_id,
        f"silent for {duration(member.last_contact_age_s)}: its node is stopped, overloaded, or cut off from the "
        "controller, and will be dropped",
        f"look at that process and its machine ({member.peer_address}); SIGCONT, or restart the engine",
    )


def lost(gone: Departed) -> Finding:
    """A member that went without a word in the last minutes."""
    return warning(
        "member.heartbeat",
        gone.instance_id,
        f"dropped {duration(gone.age_s)} ago after a time-out and not come back: killed, stopped, or cut off",
        f"look at that process and its machine ({gone.peer_address})",
    )


def pool(member: Instance) -> Iterator[Finding]:
    """A full pool evicts a chunk for each new one."""
    if member.pool_use is None or member.pool_use < FULL:
        return
    yield warning(
        "pool.full",
        member.instance_id,
        f"its pool is full: {count(member.chunks)} of {count(member.slots)} slots ({share(member.pool_use)}), so each "
        "new chunk evicts an older one, which others can no longer fetch",
        "give it a larger pool_size_gb (max_local_cpu_size) if misses are `evicted` or `not_published`",
    )


def trouble(member: Instance) -> Iterator[Finding]:
    """What the controller knows of a member that should not be."""
    if member.corrupt_chunks:
        yield problem(
            "member.corrupt",
            member.instance_id,
            f"others got {member.corrupt_chunks} chunks with wrong bytes from it (thrown away, and not asked again)",
            f"test the memory and the network of {member.peer_address}",
        )
    if member.behind_bytes > BEHIND_BYTES:
        yield warning(
            "member.behind",
            member.instance_id,
            f"{size(member.behind_bytes)} of news are on their way to it: it, or its network, cannot keep up",
            "look at its CPU and its link to the controller",
        )
    if not member.inventory_known and member.member_for_s > SETTLED_S:
        yield warning(
            "member.inventory",
            member.instance_id,
            f"a member for {duration(member.member_for_s)}, and its inventory has not come: nobody finds its chunks",
            "can its controller_pull_url be reached from there? look at its log",
        )
