"""A server that answers `/v1/completions` as vLLM does, streamed, without a model: for what asks such servers."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class OpenAiServer(http.server.ThreadingHTTPServer):
    """Every prompt is `max_tokens` tokens of answer away; of each, `cached` tokens are said to be cached."""

    def __init__(self, *, cached: int = 0, fails: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cached, self.fails = cached, fails
        self.metrics: dict[str, float] = {}
        """Shown on /metrics."""
        self.answered: dict[str, float] = {}
        """By how much each answer moves them."""
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[OpenAiServer]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join(5)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: OpenAiServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, "".join(f"{name} {value}\n" for name, value in self.server.metrics.items()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.fails:
            self._answer(500, "out of order")
            return
        prompt = body["prompt"]
        tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        events: list[dict[str, object]] = [{"choices": [{"index": 0, "text": "x"}]}] * body["max_tokens"]
        details = {"cached_tokens": min(self.server.cached, tokens)}
        events.append({"choices": [], "usage": {"prompt_tokens": tokens, "prompt_tokens_details": details}})
        for name, step in self.server.answered.items():
            self.server.metrics[name] += step
        self._answer(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
