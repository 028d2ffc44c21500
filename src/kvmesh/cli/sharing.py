"""`kvmesh check-sharing`: the result in words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import typer

from kvmesh.bench.sharing import SharingResult, check_sharing, engines_of

API_KEY_VARIABLE = "VLLM_API_KEY"


def run_check(services: Sequence[str], *, model: str, prompt_tokens: int, timeout_s: float, as_json: bool) -> int:
    """Check and print; the exit status. Raises StartupError when that is not possible."""
    urls = engines_of(services)
    api_key = os.environ.get(API_KEY_VARIABLE)
    result = check_sharing(urls, model=model, prompt_tokens=prompt_tokens, timeout_s=timeout_s, api_key=api_key)
    if as_json:
        typer.echo(json.dumps({**result._asdict(), "shared": result.pulled_chunks > 0}, indent=2))
    else:
        for line in _lines(result):
            typer.echo(line)
    return 0 if result.pulled_chunks else 1


def _lines(result: SharingResult) -> list[str]:
    told = [
        f"computed by   {result.first}  {result.prompt_tokens} tokens in {result.first_s:.3f} s",
        f"asked again   {result.second}  {result.second_s:.3f} s",
    ]
    if result.pulled_chunks:
        return [*told, f"shared: the second one pulled {result.pulled_chunks} chunks from its peers"]
    reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(result.misses.items()))
    hint = "Does the second engine run KVMeshConnector, and is the prompt at least two chunks long?"
    return [
        *told,
        f"NOT shared: the second one pulled nothing. Reasons: {reasons or 'none were counted'}",
        f"docs/metrics.md explains the reasons. {hint}",
    ]
