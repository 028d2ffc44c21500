"""The publishing policies under vLLM's own manager: a slot is never published when it is handed out again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from vllm.v1.kv_offload.base import ReqContext
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from kvmesh.core.ledger import SlotLedger
from kvmesh.vllm import policy as policy_module
from kvmesh.vllm.policy import POLICIES, KVMeshARC, KVMeshLRU
from support.vllm_fakes import offload_key

SLOTS = 5
KEYS = st.lists(st.integers(0, 11).map(offload_key), min_size=1, max_size=SLOTS, unique=True)


class Elsewhere(set):
    """Keys that others hold."""

    is_visible = set.__contains__
    visible_count = set.__len__


class PolicyMachine(RuleBasedStateMachine):
    """vLLM's manager stores, loads, fails and resets in any order; the tier's part (publishing) is played here."""

    policy_name = ""
    stores = Bundle("stores")
    loads = Bundle("loads")

    @initialize()
    def make(self) -> None:
        self.manager = CPUOffloadingManager(SLOTS, self.policy_name, "kvmesh.vllm.policy")
        self.policy = self.manager._policy
        self.ledger = SlotLedger.create(SLOTS, 4096)
        self.reported: list[int] = []
        self.elsewhere = Elsewhere()
        self.policy.attach(self.ledger, self.reported.extend, self.elsewhere)
        self.expected: dict[int, tuple[bytes, int]] = {}
        """What must be readable: key and generation by slot."""
        self.resets = self.requests = 0

    def teardown(self) -> None:
        self.ledger.close()

    def request(self, keys) -> ReqContext:
        self.requests += 1
        context = ReqContext(f"r{self.requests}")
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, position + 1)
        return context

    def left(self) -> list[int]:
        """Slots that were readable, and whose key has left the cache or moved."""
        return [
            slot
            for slot, (key, _) in self.expected.items()
            if (chunk := self.policy.get(key)) is None or chunk.chunk_id != slot
        ]

    def settle(self) -> None:
        """Everything that left was reported once, and nothing else."""
        left = self.left()
        assert sorted(self.reported) == sorted(left)
        self.reported.clear()
        for slot in left:
            del self.expected[slot]

    @rule(target=stores, keys=KEYS)
    def prepare_store(self, keys):
        context = self.request(keys)
        before = {slot: self.ledger.generation(slot) for slot in range(SLOTS)}
        output = self.manager.prepare_store(keys, context)
        slots = [] if output is None else output.store_spec.chunk_ids.tolist()
        for slot in slots:
            assert not self.ledger.generation(slot) & 1, "a slot was handed out while readable"
            assert self.ledger.generation(slot) == before[slot] + (slot in self.expected)
        self.settle()
        return context, ([] if output is None else output.keys_to_store), slots, self.resets

    @rule(store=consumes(stores), success=st.booleans())
    def complete_store(self, store, success):
        """A store or a fetch ends; the tier publishes what has come."""
        context, keys, slots, resets = store
        if resets != self.resets or not keys:
            return  # vLLM discards what was out when the cache was reset
        self.manager.complete_store(keys, context, success)
        if success:
            for key, slot in zip(keys, slots, strict=True):
                self.expected[slot] = (key, self.ledger.publish(slot, key))
        self.settle()

    @rule(target=loads, keys=KEYS)
    def prepare_load(self, keys):
        ready = [key for key in keys if (chunk := self.policy.get(key)) is not None and chunk.is_ready]
        context = self.request(keys)
        self.manager.prepare_load(ready, context)
        self.settle()
        return context, ready, self.resets

    @rule(load=consumes(loads))
    def complete_load(self, load):
        context, keys, resets = load
        if resets == self.resets:
            self.manager.complete_load(keys, context)
        self.manager.on_request_finished(context)
        self.settle()

    @rule(keys=KEYS)
    def touch(self, keys):
        self.manager.touch(keys, self.request(keys))
        self.settle()

    @rule(keys=KEYS)
    def others_store_and_evict(self, keys):
        self.elsewhere.symmetric_difference_update(keys)

    @precondition(lambda self: self.expected)
    @rule()
    def reset_cache(self):
        self.resets += 1
        self.manager.reset_cache()
        self.settle()
        assert not self.expected

    @invariant()
    def readable_is_what_is_cached(self):
        """Published slots hold cached, complete chunks at the generation at which they were published."""
        for slot in range(SLOTS):
            record = self.ledger.read(slot)
            assert (record is not None) == (slot in self.expected)
            if record is None:
                continue
            assert tuple(record) == self.expected[slot]
            chunk = self.policy.get(record.key)
            assert chunk.chunk_id == slot
            assert chunk.is_ready


class LRUMachine(PolicyMachine):
    policy_name = POLICIES["lru"]


class ARCMachine(PolicyMachine):
    policy_name = POLICIES["arc"]


for machine in (LRUMachine, ARCMachine):
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestLRU = LRUMachine.TestCase
TestARC = ARCMachine.TestCase


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_a_policy_without_a_ledger_works(policy_class):
    """With sharing off nobody attaches a ledger, and the policy is vLLM's own."""
    policy = policy_class(2)
    context = ReqContext("r")
    chunk = ChunkStatus(0)
    chunk.ref_cnt = 0
    insert(policy, offload_key(1), chunk, context)
    assert policy.evict(1, set()) == [(offload_key(1), chunk)]
    policy.clear()


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_an_eviction_that_cannot_be_made_retracts_nothing(policy_class):
    policy = policy_class(2)
    ledger = SlotLedger.create(2, 4096)
    policy.attach(ledger, lambda slots: pytest.fail(f"{slots} reported"))
    chunk = ChunkStatus(0)
    chunk.ref_cnt = 0
    insert(policy, offload_key(1), chunk, ReqContext("r"))
    ledger.publish(0, offload_key(1))
    assert policy.evict(2, set()) is None
    assert policy.evict(1, {offload_key(1)}) is None
    assert ledger.read(0) is not None
    ledger.close()


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_a_chunk_that_is_taken_out_by_name_is_retracted(policy_class):
    """Whatever reason the manager has for `remove`, its slot goes back to the free ones."""
    policy, ledger, reported = policy_class(2), SlotLedger.create(2, 4096), []
    policy.attach(ledger, reported.extend)
    for number in (0, 1):
        insert(policy, offload_key(number), ChunkStatus(number), ReqContext("r"))
    ledger.publish(0, offload_key(0))
    policy.remove(offload_key(0))
    policy.remove(offload_key(1))
    assert ledger.read(0) is None
    assert reported == [0], "the other had never been published"
    ledger.close()


def filled(policy_class, count, elsewhere=(), busy=()):
    """A policy with idle chunks 0 to count, the first of them not used for longest."""
    policy, ledger = policy_class(count), SlotLedger.create(count, 4096)
    policy.attach(ledger, lambda slots: None, Elsewhere(offload_key(number) for number in elsewhere))
    for number in range(count):
        chunk = ChunkStatus(number)
        chunk.ref_cnt = int(number in busy)
        insert(policy, offload_key(number), chunk, ReqContext("r"))
        ledger.publish(number, offload_key(number))
    return policy, ledger


def evicted(policy, n, protected=()):
    found = policy.evict(n, {offload_key(number) for number in protected})
    return None if found is None else [chunk.chunk_id for _, chunk in found]


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_what_others_hold_too_goes_before_a_last_copy(policy_class):
    """The least recently used of them first; then the others in the policy's own order. All are retracted."""
    policy, ledger = filled(policy_class, 6, elsewhere=(2, 4))
    assert evicted(policy, 1) == [2]
    assert evicted(policy, 2) == [4, 0]
    assert [ledger.read(slot) is None for slot in range(6)] == [True, False, True, False, True, False]
    assert evicted(policy, 3) == [1, 3, 5]
    assert policy.evict(1, set()) is None
    ledger.close()


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_what_is_in_use_or_protected_stays_whoever_else_holds_it(policy_class):
    policy, ledger = filled(policy_class, 4, elsewhere=(0, 1), busy=(0,))
    assert evicted(policy, 1, protected=(1,)) == [2]
    assert evicted(policy, 3, protected=(1,)) is None
    assert ledger.read(1) is not None
    assert evicted(policy, 2) == [1, 3]
    ledger.close()


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_of_what_others_hold_the_least_recently_used_goes(policy_class):
    policy, ledger = filled(policy_class, 3, elsewhere=(0, 1, 2))
    policy.touch([offload_key(0)], ReqContext("r"))
    assert evicted(policy, 2) == [1, 2]
    ledger.close()


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_that_finishes_makes_its_chunks_the_most_recent(name):
    """The manager says so when a request ends; the first chunks of its prefix are kept longest."""
    keys = [offload_key(number) for number in range(4)]
    manager = CPUOffloadingManager(4, POLICIES[name], "kvmesh.vllm.policy")
    policy = manager._policy
    ledger = SlotLedger.create(4, 4096)
    policy.attach(ledger, lambda slots: None, Elsewhere(keys))

    def request(*head_to_tail) -> ReqContext:
        context = ReqContext(f"r{len(head_to_tail)}")
        for position, key in enumerate(head_to_tail):
            context.set_offload_key_position(key, position + 1)
        return context

    first, second = request(*keys), request(*keys[:2])
    manager.complete_store(manager.prepare_store(keys, first).keys_to_store, first)
    manager.on_request_finished(first)
    manager.prepare_load(keys[:2], second)
    manager.complete_load(keys[:2], second)
    manager.on_request_finished(second)
    assert policy.most_recent(4) == [keys[0], keys[1], keys[2], keys[3]]
    assert [key for key, _ in policy.evict(3, set())] == [keys[3], keys[2], keys[1]]
    ledger.close()


@pytest.mark.parametrize("policy_class", [KVMeshLRU, KVMeshARC])
def test_an_eviction_looks_at_a_bounded_number_of_chunks(policy_class, monkeypatch):
    monkeypatch.setattr(policy_module, "LOOKS", 3)
    policy, ledger = filled(policy_class, 6, elsewhere=(2, 5))
    assert evicted(policy, 2) == [2, 0]
    ledger.close()


def insert(policy, key, chunk, context):
    """As this vLLM's manager calls it: with the request's context since 0.33."""
    try:
        policy.insert(key, chunk, context)
    except TypeError:
        policy.insert(key, chunk)
