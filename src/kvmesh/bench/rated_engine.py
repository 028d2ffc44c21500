"""A stand-in engine whose prefill takes real time, as a process that is told what to do line by line.

It computes nothing: a prefill of n tokens waits, busy, until n / tokens_per_s seconds have passed. That is the whole
model of an engine here. Looking up, deciding, fetching and measuring are what an engine's tier does, with the same
code.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from kvmesh.bench.stand_in import StandInEngine, content, kv_content, make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.core.gate import NO_GATE, GateDecision, Prefill, decide
from kvmesh.errors import StartupError

Mode = Literal["never", "always", "gate"]


class Options(msgspec.Struct, frozen=True):
    """What the process is told first."""

    config: str
    """`KVMeshConfig.to_wire`."""
    slots: int
    chunk_bytes: int
    chunk_tokens: int
    tokens_per_s: float
    like_kv: bool = False
    """Chunks are numbers like those of KV, instead of noise."""


class Put(msgspec.Struct, frozen=True, tag=True):
    """Store a document."""

    document: str
    chunks: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Answer a prompt: fetch, or compute, or both; and forget it afterwards."""

    document: str
    chunks: int
    mode: Mode


class WaitVisible(msgspec.Struct, frozen=True, tag=True):
    """Until a document is known to be held by somebody else, and whoever holds chunks has been measured."""

    document: str
    chunks: int
    peers: int


Command = Put | Ask | WaitVisible


class Answer(msgspec.Struct, frozen=True):
    """What became of a command."""

    seconds: float = 0.0
    fetched: int = 0
    computed: int = 0
    wrong: int = 0
    holders: list[str] = []
    decision: str = ""
    error: str = ""


def document_keys(document: str, chunks: int) -> list[bytes]:
    """The keys of a document's chunks."""
    return [make_key(f"{document}/{index}") for index in range(chunks)]


class RatedEngine:
    """The process's own part."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._config = KVMeshConfig.from_wire(options.config.encode())
        kv_format = stand_in_format(options.chunk_bytes, **({"kv_dtype": "bfloat16"} if options.like_kv else {}))
        self._engine = StandInEngine(
            self._config,
            slots=options.slots,
            chunk_bytes=options.chunk_bytes,
            kv_format=kv_format,
            content=kv_content if options.like_kv else content,
        )
        self._prefill = Prefill()
        self._engine.start()

    def carry_out(self, command: Command) -> Answer:
        """One command."""
        keys = document_keys(command.document, command.chunks)
        if isinstance(command, Put):
            self._engine.put(keys)
            return Answer()
        if isinstance(command, Ask):
            return self._ask(keys, command.mode)
        if not self._engine.wait_peers(command.peers, 60.0) or not self._engine.wait_visible(keys, 60.0):
            return Answer(error="the document did not become visible")
        until_s = time.monotonic() + 60.0
        while (fastest := self._engine.node.fastest()) is None or fastest.rate is None:
            if time.monotonic() > until_s:
                return Answer(error="the peers have not been measured")
            time.sleep(0.01)
        return Answer()

    def _ask(self, keys: Sequence[bytes], mode: Mode) -> Answer:
        options, node = self._options, self._engine.node
        started_s = time.perf_counter()
        visible = next((index for index, key in enumerate(keys) if not node.is_visible(key)), len(keys))
        saved = self._prefill.saved(0, options.chunk_tokens)
        decision: GateDecision | None = None
        wanted = 0 if mode == "never" else visible
        source = node.fastest()
        if mode == "gate" and source is not None and visible:
            decision = decide(
                self._config.gate_policy if source.rate is not None else NO_GATE,
                [source._replace(chunks=visible)],
                saved,
                chunk_bytes=options.chunk_bytes,
                timeout_s=self._config.fetch_timeout_s,
            )
            wanted = decision.chunks
        got: list[bytes] = []
        holders: list[str] = []
        if wanted:
            timeout_s = self._config.fetch_timeout_s
            finished = self._engine.fetch(keys[:wanted], timeout_s, saved if mode == "gate" else None)
            came = next((i for i, reason in enumerate(finished.reasons) if reason is not None), wanted)
            got, holders = list(keys[:came]), finished.holders
            decision = GateDecision(*finished.gate) if finished.gate is not None else decision
        computed = len(keys) - len(got)
        if computed:
            begun_s = time.perf_counter()
            tokens = computed * options.chunk_tokens
            while time.perf_counter() - begun_s < tokens / options.tokens_per_s:
                pass
            self._prefill.computed(len(got) * options.chunk_tokens, tokens, time.perf_counter() - begun_s)
        seconds = time.perf_counter() - started_s
        wrong = sum(self._engine.is_wrong(key) for key in random.sample(got, min(4, len(got))))
        self._engine.forget([key for key in keys if self._engine.holds(key)])
        return Answer(seconds, len(got), computed, wrong, holders, "" if decision is None else str(decision))

    def close(self) -> None:
        self._engine.close()


class RatedProcess:
    """The same, seen from the outside."""

    def __init__(self, options: Options, prefix: Sequence[str], log: int) -> None:
        """Starts it. `prefix` stands before the command, such as `ip netns exec NAME`; `log` takes its log lines."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        self._write(msgspec.json.encode(options))

    def started(self) -> None:
        """Wait until its node serves. Raises StartupError."""
        self._read()

    def tell(self, command: Command) -> Answer:
        """Have a command carried out. Raises StartupError when it cannot be."""
        self._write(msgspec.json.encode(command))
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartupError("stand-in engine", found=f"it has ended with {self._process.wait()}, see its log")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise StartupError("stand-in engine", found=answer.error)
        return answer


def main() -> None:
    """Carry out what standard input says, until it ends."""
    engine = RatedEngine(msgspec.json.decode(sys.stdin.buffer.readline(), type=Options))
    decoder = msgspec.json.Decoder(Command)
    _say(Answer())
    for line in sys.stdin.buffer:
        _say(engine.carry_out(decoder.decode(line)))
    engine.close()


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
