"""For people: what each reason of a miss means, and what to change. Used by explain, the web page and the command line.

A reason's text is complete by itself. Where numbers or names are known (`detail`), they are put into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvmesh.core.reasons import MissReason

Detail = Mapping[str, str | float]


class Advice(NamedTuple):
    """Why, and what to do."""

    text: str
    change: str


_ADVICE: dict[MissReason, Advice] = {
    MissReason.NO_PEERS: Advice(
        "No other instance with this instance's format is a member of the cluster.",
        "Start a second instance of the same model with the same kvmesh settings and the same controller. If one is "
        "running, the controller's instance list shows whether it has registered, and with which format.",
    ),
    MissReason.NOT_PUBLISHED: Advice(
        "No instance is known to hold the chunk: nobody has computed these tokens before, or its announcement has not "
        "arrived yet.",
        "Nothing to change when the prompt is new. When another instance computed it a moment ago, the next request "
        "will find it: an announcement takes milliseconds after the prefill. When another instance should hold it, "
        "see that both are sent the same text, byte by byte, from the first token on.",
    ),
    MissReason.EVICTED: Advice(
        "The chunk was held, and was evicted before this request could have it.",
        "Enlarge the host pools (pool_size_gb), pin the prefixes that matter, or route requests with the same prefix "
        "to fewer instances.",
    ),
    MissReason.STALE: Advice(
        "The holder evicted the chunk and reused its slot while it was sending; what had arrived was thrown away.",
        "A few of these are normal under pressure. Many mean that the holder's pool turns over within one transfer: "
        "enlarge it (pool_size_gb).",
    ),
    MissReason.CORRUPT: Advice(
        "The bytes that arrived do not have the checksum with which they were published; they were thrown away.",
        "Look at the holder's memory and at the network between the two (ECC and interface error counters). "
        "corrupt_chunks in the controller's instance list shows which instance it is.",
    ),
    MissReason.FORMAT_MISMATCH: Advice(
        "Another instance serves the same model, but its KV is not interchangeable with this instance's.",
        "Make the fields that differ equal on both instances and restart the one that is wrong.",
    ),
    MissReason.DEADLINE: Advice(
        "The fetch had not brought the chunk when its time was up; what had come by then was used.",
        "See how fast this pair of instances is (kvmesh bench transfer). Raise fetch_timeout_s when waiting longer "
        "is worth it, or let the holder serve fewer fetches at a time.",
    ),
    MissReason.PEER_STALLED: Advice(
        "The holder sent no byte for stall_timeout_s.",
        "See whether the holder's node is stopped, swapping or starved of CPU, and whether the network drops packets.",
    ),
    MissReason.PEER_UNREACHABLE: Advice(
        "The holder's node could not be connected to.",
        "From this machine, connect to the holder's address and port. Set advertise_host on the holder to an address "
        "that others can reach (not loopback), and open peer_port in firewalls and network policies.",
    ),
    MissReason.PEER_LOST: Advice(
        "The connection to the holder broke in the middle of the fetch.",
        "See whether the holder was restarted (its incarnation is new then) or its node ended; its log says why.",
    ),
    MissReason.UNAUTHENTICATED: Advice(
        "The two nodes do not take each other for members of one cluster.",
        "Give both instances the same cluster key (cluster_key_file or KVMESH_CLUSTER_KEY) and, with TLS, "
        "certificates of the same CA. The holder's log names the other side of the refusal.",
    ),
    MissReason.PROTOCOL: Advice(
        "The holder sent something that the protocol does not allow; its connection was closed.",
        "Run the same kvmesh version on both. If they do, another program may answer on the holder's address.",
    ),
    MissReason.BREAKER_OPEN: Advice(
        "The holder failed a moment ago and is left alone for up to 15 s.",
        "Nothing for this chunk: the holder is tried again by itself. The reason that opened the breaker stands in "
        "this node's log (peer failed) and among the reasons of earlier requests.",
    ),
    MissReason.RECENTLY_FAILED: Advice(
        "This very chunk could not be fetched a moment ago, so it was computed at once.",
        "Look at the request that failed first; this one only avoids waiting for the same failure (negative_cache_s).",
    ),
    MissReason.NO_DIRECTORY: Advice(
        "The directory cannot be reached, so nothing is known of what other instances have computed lately.",
        "Start the controller or Redis, or correct controller_pull_url and controller_reply_url, or lookup_url; see "
        "that the ports can be reached from this machine and that both sides have the same cluster key or password. "
        "The node's /healthz names the trouble (directory_problem).",
    ),
    MissReason.DIRECTORY_SLOW: Advice(
        "The directory was asked who holds the chunk and did not answer within a moment, so the engine computed it.",
        "Look at the directory's load and at the network between; or let nodes hold a replica (index_mode: replica).",
    ),
    MissReason.NODE_DOWN: Advice(
        "The engine's node process was not running; it is started again by itself.",
        "The engine's log says why the node ended (kvmesh_node_restarts counts it).",
    ),
    MissReason.POOL_FULL: Advice(
        "No slot of this instance's host pool was free to fetch into: all are in use by running requests.",
        "Enlarge the pool (pool_size_gb), or let fewer requests run at a time (vLLM's --max-num-seqs).",
    ),
    MissReason.SHARING_OFF: Advice(
        "This instance publishes but does not fetch: its retrieve_locations do not name the peers.",
        "Add peers (P2PBackend) to retrieve_locations, or remove the key.",
    ),
    MissReason.BELOW_MINIMUM: Advice(
        "The peers hold fewer tokens of this prompt than min_retrieve_tokens asks for.",
        "Lower min_retrieve_tokens if such short prefixes are worth a fetch.",
    ),
    MissReason.DRAINING: Advice(
        "Nothing is fetched while the pool is being reset or the engine is stopping.",
        "Nothing to change: it ends by itself after the next chunk that the engine stores.",
    ),
    MissReason.BELOW_ONE_CHUNK: Advice(
        "The prompt is shorter than one chunk, and only whole chunks are shared.",
        "Nothing to change for short prompts: computing them is quick. If most are shorter, lower chunk_tokens on all "
        "instances.",
    ),
    MissReason.TENANT_SALT: Advice(
        "The same tokens are known in another context: under another cache_salt, without one, or with another adapter. "
        "Contexts never share, so that tenants cannot learn of each other's prompts.",
        "Send the same cache_salt with requests that may share; leave it away where nothing has to be kept apart.",
    ),
    MissReason.GATE_REFUSED: Advice(
        "Fetching was predicted to take longer than computing.",
        "Nothing to change when the prediction is right: a fetch would have made the request slower. A faster link "
        "or transport (transfer_channel) changes it.",
    ),
    MissReason.NOT_ASKED: Advice(
        "The engine did not ask for these chunks: requests for prompt log probabilities read no cache, limits such as "
        "max_load_tokens end a prefix, and prompts given as embeddings have no keys.",
        "Leave those options away from requests that shall use the cache.",
    ),
    MissReason.TRUNCATED: Advice(
        "An earlier chunk of the same prefix was missing, so this one could not have been used.",
        "Look at the reason of the first missing chunk.",
    ),
}


def advise(reason: MissReason, detail: Detail | None = None) -> Advice:
    """What to tell a person about a miss. `detail` as in `kvmesh.wire.explain.Cause`."""
    advice = _ADVICE[reason]
    extra = _extra(reason, detail or {})
    return advice._replace(text=f"{advice.text} {extra}") if extra else advice


def _extra(reason: MissReason, detail: Detail) -> str:
    """The sentence with this case's numbers; empty when they are unknown."""
    have = detail.keys()
    for needed, sentence in _EXTRAS.get(reason, ()):
        if needed <= have:
            return sentence.format_map({name: _show(name, value) for name, value in detail.items()})
    return ""


_ADDRESS = (frozenset({"address"}), "Its address: {address}.")
_EXTRAS: dict[MissReason, tuple[tuple[frozenset[str], str], ...]] = {
    MissReason.GATE_REFUSED: (
        (
            frozenset({"fetch_s", "prefill_s"}),
            "Predicted: {fetch_s} to fetch, {prefill_s} to compute the same tokens.",
        ),
    ),
    MissReason.BELOW_ONE_CHUNK: (
        (frozenset({"prompt_tokens", "chunk_tokens"}), "It has {prompt_tokens} tokens; a chunk has {chunk_tokens}."),
    ),
    MissReason.BELOW_MINIMUM: (
        (frozenset({"held_tokens", "min_retrieve_tokens"}), "They hold {held_tokens} of {min_retrieve_tokens}."),
    ),
    MissReason.EVICTED: ((frozenset({"gone_s", "instance"}), "Instance {instance} lost it {gone_s} before."),),
    MissReason.NOT_PUBLISHED: (
        (
            frozenset({"asked_s", "asked_at"}),
            "Instance {asked_at} was asked for it {asked_s} before: it may be computing it, or just have done so.",
        ),
        (frozenset({"left", "why"}), "Its last holder, instance {left}, is no member any more ({why})."),
    ),
    MissReason.FORMAT_MISMATCH: ((frozenset({"instance", "differs"}), "Instance {instance} differs in {differs}."),),
    MissReason.RECENTLY_FAILED: ((frozenset({"failed_with"}), "It failed with {failed_with}."),),
    MissReason.DEADLINE: (
        (
            frozenset({"fetch_timeout_s", "stall_timeout_s"}),
            "fetch_timeout_s is {fetch_timeout_s} here, stall_timeout_s {stall_timeout_s}.",
        ),
    ),
    MissReason.PEER_STALLED: ((frozenset({"stall_timeout_s"}), "stall_timeout_s is {stall_timeout_s} here."),),
    MissReason.PEER_UNREACHABLE: (_ADDRESS,),
    MissReason.PEER_LOST: (_ADDRESS,),
    MissReason.UNAUTHENTICATED: (_ADDRESS,),
    MissReason.PROTOCOL: (_ADDRESS,),
    MissReason.BREAKER_OPEN: (_ADDRESS,),
    MissReason.CORRUPT: (_ADDRESS,),
}
"""By reason: names that a sentence needs, and the sentence; the first that has all of them is told."""


def _show(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    if not name.endswith("_s"):
        return f"{value:g}"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
