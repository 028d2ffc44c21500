"""An engine's HTTP side as a process, which does what the request's body says: for the router's tests.

    python fake_engine.py PORT NAME [MODEL ...]

Fields of a POST's body: `events` (how many, default 3), `hold_after` (wait for /release before the next event),
`die_after` (exit after so many events; 0: after the head), `die` (exit before anything), `status` (answer with it),
`plain` (one JSON answer of a known length instead of a stream), `pad` (bytes in each event).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter

from aiohttp import web


class FakeEngine:
    def __init__(self, name: str, models: list[str]) -> None:
        self.name = name
        self.models = models
        self.counts: Counter[str] = Counter()
        self.changed = asyncio.Condition()
        self.released = asyncio.Event()
        self.sick = False
        self.key = ""

    async def count(self, what: str) -> None:
        async with self.changed:
            self.counts[what] += 1
            self.changed.notify_all()

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=500 if self.sick else 200)

    async def control(self, request: web.Request) -> web.Response:
        """/control/release, /control/sick, /control/well, /control/key/KEY."""
        what, _, value = request.match_info["what"].partition("/")
        if what == "release":
            self.released.set()
        elif what == "hold":
            self.released.clear()
        elif what == "key":
            self.key = value
        else:
            self.sick = what == "sick"
        return web.Response()

    async def wait(self, request: web.Request) -> web.Response:
        """Answers as soon as something has happened so often: /wait/disconnects/1."""
        what, number = request.match_info["what"], int(request.match_info["number"])
        async with self.changed:
            await self.changed.wait_for(lambda: self.counts[what] >= number)
        return web.json_response(self.counts)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "wrong key", "code": 401}}, status=401)
        cards = [{"id": model, "object": "model", "root": model} for model in self.models]
        return web.json_response({"object": "list", "data": cards})

    async def tokenize(self, request: web.Request) -> web.Response:
        """A token is a word; equal words are equal tokens."""
        asked = await request.json()
        text = asked["prompt"] if "prompt" in asked else json.dumps(asked["messages"])
        await self.count("tokenize")
        return web.json_response({"tokens": [int.from_bytes(word.encode()[:3], "big") for word in text.split()]})

    async def any(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        await self.count("requests")
        if asked.get("die"):
            os._exit(1)
        told = {
            "engine": self.name,
            "method": request.method,
            "target": request.raw_path,
            "headers": dict(request.headers),
            "length": len(body),
        }
        if "status" in asked:
            return web.json_response(told, status=asked["status"])
        if asked.get("plain") or not asked:
            return web.json_response(told, headers={"X-Engine": self.name})
        try:
            return await self._stream(request, asked, told)
        except (asyncio.CancelledError, ConnectionError):
            await self.count("disconnects")
            raise

    async def _stream(self, request: web.Request, asked: dict, told: dict) -> web.StreamResponse:
        kind = asked.get("content_type", "text/event-stream")
        response = web.StreamResponse(headers={"Content-Type": kind, "X-Engine": self.name})
        if kind == "text/event-stream":
            response.enable_chunked_encoding()
        else:
            response.content_length = 1_000_000
        await response.prepare(request)
        for number in range(asked.get("events", 3)):
            if asked.get("die_after") == number:
                await asyncio.sleep(0.05)  # what was written must have left the process
                os._exit(1)
            if asked.get("hold_after") == number:
                await self.count("holding")
                await self.released.wait()
            event = {"number": number, **told} if number == 0 else {"number": number}
            if "pad" in asked:
                event["pad"] = "x" * asked["pad"]
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def main(port: int, name: str, models: list[str]) -> None:
    engine = FakeEngine(name, models)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/health", engine.health)
    app.router.add_post("/control/{what:.*}", engine.control)
    app.router.add_get("/wait/{what}/{number}", engine.wait)
    app.router.add_get("/v1/models", engine.list_models)
    app.router.add_post("/tokenize", engine.tokenize)
    app.router.add_route("*", "/{path:.*}", engine.any)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] or ["model"]))
