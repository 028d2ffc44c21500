"""Do these engines share KV? One new prompt to one of them and then to another, which must pull it: `check_sharing`.

What counts is the second engine's own counter of chunks that came from peers, not the time it took. A prompt of random
words has never been seen before, so that neither engine can have it from elsewhere.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from kvmesh.errors import StartupError

FETCHED = "kvmesh_fetched_chunks_total"
LOOKED_UP = "kvmesh_lookup_chunks_total"
_SYLLABLES = ("ka", "lo", "mi", "nu", "pe", "ra", "si", "to")
RETRY_S = 1.0


class SharingResult(NamedTuple):
    """What one try gave."""

    first: str
    second: str
    """URLs of the engines: the one that computed, the one that should have pulled."""
    prompt_tokens: int
    pulled_chunks: int
    first_s: float
    second_s: float
    """Seconds for the whole answer of each."""
    misses: Mapping[str, int]
    """Why the second one did not find chunks, by reason."""


def engines_of(services: Sequence[str]) -> list[str]:
    """The URLs of all engines behind these services: one for each address of each host name.

    Raises StartupError when a name cannot be resolved.
    """
    urls = []
    for service in services:
        parts = urlsplit(service)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise StartupError(service, expected="a URL such as http://engines:8000", found=service)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise StartupError(
                service, expected="a name that can be resolved", found=str(error), hint="are any of its pods ready?"
            ) from error
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            host = f"[{address}]" if ":" in address else address
            urls.append(f"{parts.scheme}://{host}:{port}")
    return list(dict.fromkeys(urls))


def check_sharing(
    urls: Sequence[str], *, model: str, prompt_tokens: int, timeout_s: float, api_key: str | None = None
) -> SharingResult:
    """Send a new prompt to the first engine and then to the second; try again with another prompt until `timeout_s`.

    Engines learn of each other, and of what the others hold, a moment after they have become ready; so the first try
    may miss. Raises StartupError when there are fewer than two engines or one of them does not answer as it should.
    """
    if len(urls) < 2:
        raise StartupError(
            "sharing", expected="at least two engines", found=f"{len(urls)}: {', '.join(urls) or 'none'}"
        )
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    until_s = time.monotonic() + timeout_s
    with httpx.Client(headers=headers, timeout=timeout_s) as client:
        while True:
            result = _try_once(client, urls[0], urls[1], model, prompt_tokens)
            if result.pulled_chunks or time.monotonic() > until_s:
                return result
            time.sleep(RETRY_S)


def _try_once(client: httpx.Client, first: str, second: str, model: str, prompt_tokens: int) -> SharingResult:
    # One word of two syllables is one to four tokens, depending on the tokenizer, so this is at least what was asked.
    words = random.Random()
    prompt = " ".join("".join(words.choices(_SYLLABLES, k=2)) for _ in range(prompt_tokens))
    tokens, first_s = _complete(client, first, model, prompt, prompt_tokens)
    time.sleep(RETRY_S)  # publishing goes on after the answer, and there is nothing here to wait for
    before = _counters(client, second)
    _, second_s = _complete(client, second, model, prompt, prompt_tokens)
    after = _counters(client, second)
    misses = {
        reason: after[LOOKED_UP][reason] - before[LOOKED_UP].get(reason, 0)
        for reason in after[LOOKED_UP]
        if after[LOOKED_UP][reason] > before[LOOKED_UP].get(reason, 0)
    }
    pulled = sum(after[FETCHED].values()) - sum(before[FETCHED].values())
    return SharingResult(first, second, tokens, pulled, first_s, second_s, misses)


def _complete(client: httpx.Client, url: str, model: str, prompt: str, prompt_tokens: int) -> tuple[int, float]:
    """(tokens of the prompt, seconds) of one answer of one token."""
    body: dict[str, object] = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    body["truncate_prompt_tokens"] = prompt_tokens
    started_s = time.monotonic()
    answer = _ask(client, "POST", f"{url}/v1/completions", json=body)
    usage = answer.json().get("usage") or {}
    return int(usage.get("prompt_tokens", 0)), time.monotonic() - started_s


def _counters(client: httpx.Client, url: str) -> dict[str, dict[str, int]]:
    """The two counters by reason (an empty one where there is none)."""
    found: dict[str, dict[str, int]] = {FETCHED: {}, LOOKED_UP: {}}
    for line in _ask(client, "GET", f"{url}/metrics").text.splitlines():
        name, _, rest = line.partition("{")
        if name.partition(" ")[0] not in found or line.startswith("#"):
            continue
        labels, _, value = rest.rpartition(" ") if rest else ("", "", line.rpartition(" ")[2])
        if name == LOOKED_UP and 'result="miss"' not in labels:
            continue
        reason = labels.partition('reason="')[2].partition('"')[0]
        counts = found[name.partition(" ")[0]]
        counts[reason] = counts.get(reason, 0) + int(float(value))
    return found


def _ask(client: httpx.Client, method: str, url: str, **request: object) -> httpx.Response:
    try:
        answer = client.request(method, url, **request)  # type: ignore[arg-type]
    except httpx.HTTPError as error:
        raise StartupError(url, expected="an answer", found=f"{type(error).__name__}: {error}") from error
    if answer.status_code != httpx.codes.OK:
        raise StartupError(url, expected="status 200", found=f"{answer.status_code}: {answer.text[:300]}")
    return answer
