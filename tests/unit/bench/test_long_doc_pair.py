"""The driver of long-doc-qa: what it asks of whom, its sentence, its exit status."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from kvmesh.bench.long_doc_pair import PairRun
from kvmesh.bench.long_doc_qa import Round
from kvmesh.cli.app import app
from support.openai_server import OpenAiServer


def warm_up(ttft_s: float, seconds: float) -> Round:
    return Round("Warmup", 50, 50, seconds, ttft_s, ttft_s, ttft_s, ttft_s, ttft_s, 0, 0)


def test_the_closing_sentence_has_the_measured_numbers() -> None:
    """With the figures of LMCache's page, it is that page's sentence."""
    run = PairRun(True, (warm_up(2.286, 37.957),) * 2, (warm_up(1.036, 13.814),) * 2)
    assert run.sentence() == (
        "With KVMesh P2P sharing enabled, the time to first token (TTFT) is reduced by 54.7%, from 2.286 s to 1.036 s, "
        "with a 63.6% reduction in total inference time (37.957 s → 13.814 s)."
    )
    slower = PairRun(False, (warm_up(1.0, 10.0),) * 2, (warm_up(1.1, 11.0),) * 2)
    assert "Without sharing, the time to first token (TTFT) grows by 10.0%" in slower.sentence()


def test_both_servers_are_asked_the_same_one_after_the_other() -> None:
    """Warm-up and query round of the first, then of the second; the result is JSON with both."""
    with OpenAiServer().running() as first, OpenAiServer().running() as second:
        command = ["bench", "long-doc-pair", "--urls", f"{first.url}, {second.url}/", "--model", "m", "--json"]
        done = CliRunner().invoke(
            app, [*command, "--num-documents", "3", "--document-length", "5", "--output-len", "2"]
        )
        assert done.exit_code == 0, done.output
        (run,) = json.loads(done.stdout)["runs"]
    prompts = [body["prompt"] for body in first.bodies]
    assert sorted(prompts) == sorted([f"{number} hi hi hi hi hi" for number in range(3)] * 2)
    assert sorted(prompts) == sorted(body["prompt"] for body in second.bodies)
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in second.bodies} == {("m", 2, 0)}
    warm, query = run["second"]
    assert (warm["name"], warm["successes"], warm["prompt_tokens"], warm["output_tokens"]) == ("Warmup", 3, 18, 6)
    assert (query["name"], query["successes"]) == ("Query", 3)
    assert run["sentence"].startswith("With KVMesh P2P sharing enabled")


def test_a_failed_request_is_a_failed_benchmark() -> None:
    with OpenAiServer().running() as first, OpenAiServer(fails=True).running() as second:
        done = CliRunner().invoke(app, ["bench", "long-doc-pair", "--urls", f"{first.url},{second.url}", "--quick"])
    assert done.exit_code == 1
    assert "Warmup round successful prompt count: 0" in done.stdout


def test_one_url_is_not_a_pair() -> None:
    done = CliRunner().invoke(app, ["bench", "long-doc-pair", "--urls", "http://a:1"])
    assert done.exit_code == 2
