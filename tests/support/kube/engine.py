"""A program that stands for `vllm`: answers as an OpenAI server does, with the name of its pod as text.

Run inside a pod, where the chart starts `vllm serve MODEL --host ... --port ...`. As vLLM with a shutdown time-out, it
ends what it has begun when it is told to stop.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time

ANSWER_S = 0.05


class _UnderWay:
    """Requests that are being answered."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_none(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)


under_way = _UnderWay()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        model = sys.argv[2]
        answers = {"/health": {}, "/v1/models": {"object": "list", "data": [{"id": model, "object": "model"}]}}
        self._answer(answers.get(self.path, {}), 200 if self.path in answers else 404)

    def do_POST(self) -> None:
        with under_way:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(ANSWER_S)
            self._answer({"choices": [{"text": os.environ["POD_NAME"]}], "model": sys.argv[2]})

    def _answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve until SIGTERM."""
    arguments = dict(zip(sys.argv, sys.argv[1:], strict=False))
    server = http.server.ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), _Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.02)
    under_way.wait_none()


if __name__ == "__main__":
    main()
