"""One streamed completion from an OpenAI-compatible server, timed. For benchmarks that keep many in flight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import httpx
import msgspec

REQUEST_TIMEOUT_S = 3600.0
"""A long queue in front of a slow engine is what benchmarks make on purpose."""


class Streamed(NamedTuple):
    """One answer. Times in seconds from the sending of the request."""

    ttft_s: float
    total_s: float
    output_tokens: int
    """Events that carried text."""
    prompt_tokens: int
    """As the server counts them; 0 where it does not say."""
    cached_tokens: int
    """Of the prompt, those that were not computed; 0 where the server does not say (vLLM:
    `--enable-prompt-tokens-details`).
    """


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None


_events = msgspec.json.Decoder(_Event)


async def ask(client: httpx.AsyncClient, model: str, prompt: str | Sequence[int], output_tokens: int) -> Streamed:
    """Ask `/v1/completions`, greedy; `prompt` is text or token ids.

    Raises:
        httpx.HTTPError: the server cannot be reached, or the connection broke.
        ValueError: it answered with an error, or without a token.
    """
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s, count, usage = 0.0, 0, _Usage()
    async with client.stream("POST", "/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S) as answer:
        if answer.status_code != httpx.codes.OK:
            text = (await answer.aread()).decode(errors="replace")
            raise ValueError(f"{answer.status_code}: {text[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = _events.decode(line.removeprefix("data: "))
            usage = event.usage or usage
            if event.choices:
                first_s = first_s or time.perf_counter() - started_s
                count += 1
    if not count:
        raise ValueError("the answer had no tokens")
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details is not None else 0) or 0
    return Streamed(first_s, time.perf_counter() - started_s, count, usage.prompt_tokens, cached)


def percentile(values: Sequence[float], share: float) -> float:
    """Of values in any order; 0 without any. `share` 0.5 is the median."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
