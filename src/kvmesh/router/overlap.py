"""What of a prompt is held where: from a request to an `Overlap`, or to a reason why there is none.

    request -> tokens          in the request, or from a backend's /tokenize, so that its template and tokenizer count
    tokens -> chunk keys       `kvmesh.core.block_hashes`, by the rule in the instances' format
    chunk keys -> holders      `directory.py`

All of it together has one deadline, and whatever goes wrong means that the request goes by load.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

import msgspec
import xxhash

from kvmesh.core.block_hashes import HashRule, LoraKey, chunk_keys
from kvmesh.core.keys import ChunkKey
from kvmesh.router.backends import BackendState
from kvmesh.router.directory import MAX_KEYS, Directory, DirectoryInstance, DirectoryLookupError, Holdings
from kvmesh.router.models import fetch
from kvmesh.router.policies import Overlap
from kvmesh.router.request import Facts, token_question
from kvmesh.router.upstream import Upstream, UpstreamError

MAX_TOKENS_BYTES = 64 << 20
"""Of an answer of /tokenize."""
LOOKUP_SHARE = 0.8
"""Of the time-out, for the directory alone."""
RANK_SUFFIX = "-dp"
"""Between an engine's id and the data-parallel rank, each of which is an instance of its own."""


class _Tokens(msgspec.Struct):
    tokens: list[int]


_tokens_decoder = msgspec.json.Decoder(_Tokens)


class _UnknownError(Exception):
    """Why the overlap is not known, in one word."""


class Prompt(msgspec.Struct, frozen=True):
    """A prompt that has been tokenized."""

    tokens: int
    keys: tuple[ChunkKey, ...]


class KeyCache:
    """Chunk keys of prompts that have been seen, by a digest of what was asked. Bounded by the number of keys."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._keys = 0
        self._prompts: OrderedDict[bytes, Prompt] = OrderedDict()

    def __len__(self) -> int:
        return self._keys

    def get(self, digest: bytes) -> Prompt | None:
        found = self._prompts.get(digest)
        if found is not None:
            self._prompts.move_to_end(digest)
        return found

    def put(self, digest: bytes, prompt: Prompt) -> None:
        old = self._prompts.pop(digest, None)
        self._keys += _weight(prompt) - (0 if old is None else _weight(old))
        self._prompts[digest] = prompt
        while self._keys > self._max_keys and self._prompts:
            _, gone = self._prompts.popitem(last=False)
            self._keys -= _weight(gone)


def _weight(prompt: Prompt) -> int:
    return len(prompt.keys) + 4  # the entry itself


class OverlapFinder:
    """Finds overlaps for the policy `kv`."""

    def __init__(self, directory: Directory, upstream: Upstream, *, timeout_s: float, cache_keys: int) -> None:
        self._directory = directory
        self._upstream = upstream
        self._timeout_s = timeout_s
        self.cache = KeyCache(cache_keys)
        self.problems: Counter[str] = Counter()

    async def find(self, facts: Facts, candidates: list[BackendState]) -> tuple[Overlap | None, str]:
        """The overlap, or None and why. Never raises, and takes no longer than the time-out."""
        try:
            return await asyncio.wait_for(self._find(facts, candidates), self._timeout_s), ""
        except _UnknownError as error:
            problem = str(error)
        except asyncio.TimeoutError:
            problem = "overlap_timeout"
        except DirectoryLookupError:
            problem = "no_directory"
        except UpstreamError:
            problem = "tokenize_failed"
        self.problems[problem] += 1
        return None, problem

    async def _find(self, facts: Facts, candidates: list[BackendState]) -> Overlap:
        if len(candidates) < 2:
            raise _UnknownError("no_choice")
        known = self._directory.instances
        if known is None:
            raise _UnknownError("no_directory")
        members = _members(candidates, known)
        if not members:
            raise _UnknownError("unknown_instances")
        rules = {instance.rule for instances in members.values() for instance in instances}
        problems = [one.problem for instances in members.values() for one in instances if one.problem]
        if problems or len(rules) != 1:
            raise _UnknownError("format")  # of one model there is one format, unless somebody has made a mistake
        rule = next(iter(rules))
        prompt = await self._prompt(facts, rule, candidates)
        if not prompt.keys:
            raise _UnknownError("short")
        # Less than all of the time, so that a directory that hangs is known as the culprit.
        held = await self._directory.lookup(prompt.keys, LOOKUP_SHARE * self._timeout_s)
        return overlap_of(prompt, rule.chunk_tokens, members, held)

    async def _prompt(self, facts: Facts, rule: HashRule, candidates: Sequence[BackendState]) -> Prompt:
        question = token_question(facts)
        if question.problem:
            raise _UnknownError(question.problem)
        tokens = question.tokens
        if tokens is None and len(question.body) < rule.chunk_tokens:
            raise _UnknownError("short")  # fewer bytes than tokens in a chunk
        lora = _lora(facts.model, candidates)
        salt = facts.body.cache_salt or ""
        # A length or a digest before each part: two requests never look the same.
        context = msgspec.msgpack.encode((facts.path, rule, lora, salt, question.body, tokens))
        digest = xxhash.xxh3_128_digest(context)
        found = self.cache.get(digest)
        if found is not None:
            return found
        if tokens is None:
            tokens = await self._tokenize(question.body, candidates)
        keys = chunk_keys(tokens, rule, cache_salt=salt, lora=lora, max_chunks=MAX_KEYS)
        prompt = Prompt(len(tokens), tuple(keys))
        self.cache.put(digest, prompt)
        return prompt

    async def _tokenize(self, body: bytes, candidates: Sequence[BackendState]) -> list[int]:
        """Ask the backend that has the least to do."""
        state = min(candidates, key=lambda candidate: candidate.load.inflight)
        status, answer = await fetch(
            self._upstream,
            state,
            "POST",
            "/tokenize",
            b"Content-Type: application/json\r\n",
            body,
            timeout_s=self._timeout_s,
            limit_bytes=MAX_TOKENS_BYTES,
        )
        if status != 200:
            raise _UnknownError("tokenize_refused")
        try:
            return _tokens_decoder.decode(answer).tokens
        except (msgspec.MsgspecError, RecursionError):
            raise _UnknownError("tokenize_failed") from None


def _lora(model: str | None, candidates: Sequence[BackendState]) -> LoraKey | None:
    """The adapter behind a model's name, which is part of the hashes."""
    for state in candidates:
        served = (state.models or {}).get(model or "")
        if served is not None:
            return (served.id, served.root) if served.parent else None
    return None


def _members(
    candidates: Sequence[BackendState], known: Mapping[str, DirectoryInstance]
) -> dict[str, list[DirectoryInstance]]:
    """The instances of each backend: one, or one per data-parallel rank. Identity is the name, never an address."""
    by_engine: dict[str, list[DirectoryInstance]] = {}
    for instance_id, instance in known.items():
        engine, separator, rank = instance_id.rpartition(RANK_SUFFIX)
        by_engine.setdefault(instance_id, []).append(instance)
        if separator and rank.isdigit():
            by_engine.setdefault(engine, []).append(instance)
    return {state.id: by_engine[state.backend.name] for state in candidates if state.backend.name in by_engine}


def overlap_of(
    prompt: Prompt,
    chunk_tokens: int,
    members: Mapping[str, Sequence[DirectoryInstance]],
    held: Mapping[str, Holdings],
) -> Overlap:
    """Put together what the directory said. What a backend can reach is what its format's instances hold together."""
    own: dict[str, int] = {}
    reachable: dict[str, int] = {}
    for backend_id, instances in members.items():
        for instance in instances:
            holdings = held.get(instance.format_id)
            if holdings is None:
                continue
            mine = holdings.by_instance.get(instance.instance_id, 0) * chunk_tokens
            own[backend_id] = max(own.get(backend_id, 0), mine)
            reachable[backend_id] = max(reachable.get(backend_id, 0), holdings.together * chunk_tokens)
    return Overlap(prompt.tokens, own, reachable, prompt.keys, chunk_tokens)
