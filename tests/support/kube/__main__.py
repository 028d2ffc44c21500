"""The tutorial on this machine, without a cluster: `make tutorial`. Stays until Ctrl-C.

    PYTHONPATH=src:tests python -m support.kube [--controller] [--bench]

Pods are real processes in network namespaces (root, iproute2 and redis-server are needed), their model is a random one.
`--bench` sends long documents to the one engine and then to the other, as `kvmesh bench long-doc-qa` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from kvmesh.bench.cluster import complete
from kvmesh.bench.long_doc_qa import LongDocQa, run_long_doc_qa
from kvmesh.models import THIN
from support.kube.tutorial import MODEL, SENTENCE, missing, running_tutorial


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m support.kube", description=__doc__)
    parser.add_argument("--controller", action="store_true", help="with a controller as directory, not Redis")
    parser.add_argument("--bench", action="store_true", help="measure, then stop")
    chosen = parser.parse_args()
    if reason := missing():
        parser.exit(1, f"not possible here: {reason}\n")
    sets = ["kvmeshSpec.directory=controller"] if chosen.controller else []
    with tempfile.TemporaryDirectory(prefix="kvmesh-tutorial-") as name:
        folder = Path(name)
        with running_tutorial(folder, sets=sets, shape=THIN, helm="helm3") as stack:
            router = stack.cluster.service_url("vllm-router-service")
            print(f"router   {router}")
            for pod in stack.engines:
                print(f"engine   http://{pod.address}:8000  {pod.name}")
            if chosen.bench:
                _measure([f"http://{pod.address}:8000" for pod in stack.engines])
                return
            for _ in range(2):
                print(f"answer   {stack.ask(SENTENCE * 100)!r}")
            for pod in stack.engines:
                for line in pod.log().splitlines():
                    if "Retrieved " in line or "Established connection" in line:
                        print(f"{pod.name}: {line}")
            print(f"logs     {folder}/cluster/pods/*/log\nCtrl-C ends everything")
            try:
                while True:
                    time.sleep(1)
            except KeyboardInterrupt:
                return


def _measure(urls: list[str]) -> None:
    for url in urls:
        complete(
            url, "warm up", max_tokens=2, model=MODEL
        )  # the first request of an engine is slow for its own reasons
    for number, url in enumerate(urls, 1):
        print(f"\nEngine {number}", flush=True)
        plan = LongDocQa(
            model=MODEL,
            base_url=url,
            num_documents=10,
            document_length=4000,
            output_len=10,
            repeat_count=1,
            repeat_mode="tile",
            max_inflight_requests=1,
        )
        run_long_doc_qa(plan, as_json=False)


if __name__ == "__main__":
    main()
