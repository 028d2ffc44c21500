"""Many small streamed requests over kept connections, and how long each took: the client of `kvmesh bench router`.

    python -m kvmesh.bench.http_load PORT CONNECTIONS SECONDS [RATE]

Without RATE each connection asks again as soon as it has its answer; with it, requests start at that rate in all.
Prints one JSON object. It reads no more of HTTP than it must, so that the router is what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from typing import cast

BODY = json.dumps({"model": "model", "prompt": "Say something.", "max_tokens": 8, "stream": True}).encode()
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
REQUEST = HEAD.format(len(BODY)).encode() + BODY
END = b"0\r\n\r\n"
WARM_UP_SHARE = 0.2
"""Of the time, at the beginning, that is not counted."""


class LoadClient(asyncio.Protocol):
    """One connection: `ask` sends a request and waits for the whole answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._tail = b""
        self.first_byte_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by name

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(False)

    def data_received(self, data: bytes) -> None:
        if not self.first_byte_s and b"data:" in data:
            self.first_byte_s = time.perf_counter()
        self._tail = (self._tail + data)[-256:]
        if self._tail.endswith(END) and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(self.first_byte_s > 0)

    async def ask(self) -> bool:
        """Whether a whole stream came."""
        if self._transport is None:
            return False
        self._tail, self.first_byte_s = b"", 0.0
        self._waiter = self._loop.create_future()
        self._transport.write(REQUEST)
        return await self._waiter


async def load(port: int, connections: int, seconds: float, rate: float) -> dict[str, float]:
    """Ask for so long and sum up. Times in milliseconds."""
    loop = asyncio.get_running_loop()
    first_ms: list[float] = []
    total_ms: list[float] = []
    failed = 0
    started_s = time.perf_counter()
    counted_from_s = started_s + WARM_UP_SHARE * seconds
    until_s = started_s + seconds

    async def one(number: int) -> None:
        nonlocal failed
        _, client = await loop.create_connection(lambda: LoadClient(loop), "127.0.0.1", port)
        due_s = started_s + number / rate if rate else started_s
        while (now_s := time.perf_counter()) < until_s:
            if rate:
                await asyncio.sleep(max(0.0, due_s - now_s))
                due_s += connections / rate
            begun_s = time.perf_counter()
            if not await client.ask():
                failed += 1
                return
            if begun_s >= counted_from_s:
                first_ms.append(1000 * (client.first_byte_s - begun_s))
                total_ms.append(1000 * (time.perf_counter() - begun_s))

    await asyncio.gather(*(one(number) for number in range(connections)))
    first_ms.sort()
    total_ms.sort()

    def share(values: list[float], part: float) -> float:
        return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")

    return {
        "requests_per_s": len(total_ms) / (time.perf_counter() - counted_from_s),
        "first_byte_p50_ms": share(first_ms, 0.5),
        "first_byte_p99_ms": share(first_ms, 0.99),
        "total_p50_ms": share(total_ms, 0.5),
        "total_p99_ms": share(total_ms, 0.99),
        "failed": failed,
    }


def _run(main: Coroutine[None, None, dict[str, float]]) -> dict[str, float]:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def main() -> None:
    """Run from the command line."""
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    rate = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    sys.stdout.write(json.dumps(_run(load(port, connections, seconds, rate))) + "\n")


if __name__ == "__main__":
    main()
