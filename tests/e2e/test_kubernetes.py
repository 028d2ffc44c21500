"""The chart's pods as they are rendered, started as processes: the tutorial, end to end.

`helm install` writes to a real API; every pod gets a network namespace, its volumes, variables, probes and hooks;
the images are this machine's own programs. Only sizes differ from the tutorial's values: one engine per model and a
small pool.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.helm import CHART, SEED
from support.kube.tutorial import SENTENCE, SMALLER, Stack, missing, running_tutorial
from support.network_policies import End, allowed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with running_tutorial(tmp_path_factory.mktemp("tutorial")) as running:
        yield running


def test_the_second_request_is_pulled_from_the_other_pod(stack: Stack) -> None:
    """Two curls, one router: the second answer is the other engine's, which has pulled the KV, and is the same."""
    before = [stack.pulled(pod) for pod in stack.engines]
    prompt = SENTENCE * 100
    first, second = stack.ask(prompt), stack.ask(prompt)
    assert first == second
    after = [stack.pulled(pod) for pod in stack.engines]
    grown = [new - old for old, new in zip(before, after, strict=True)]
    assert min(grown) == 0 < max(grown), stack.cluster.logs()
    (second_pod,) = (pod for pod, more in zip(stack.engines, grown, strict=True) if more)
    assert "Retrieved " in second_pod.log()


def test_helm_test(stack: Stack) -> None:
    """`helm test` proves a hit across pods and says so."""
    result = stack.act("test", "vllm", "--logs", "--timeout", "180s")
    assert "shared: the second one pulled" in result.out, result.out


def test_what_pods_do_is_what_policies_allow(stack: Stack) -> None:
    """Every connection that a pod has opened would pass the rendered NetworkPolicies; the expected ones are there."""
    rendered = stack.helm.render(SEED, sets=SMALLER).manifests
    policies = [one for one in rendered if one["kind"] == "NetworkPolicy"]
    seen: set[tuple[str, ...]] = set()

    def look() -> bool:
        """Checks what is connected now; whether all that is expected has been seen."""
        for pod in list(stack.cluster.pods.values()):
            for address, port in stack.cluster.network.connections(pod.space):
                # A service's address stands for the pod behind it, which listens on another port.
                target, port_there = stack.cluster.behind(address, port)
                if target is None:
                    continue  # the API server
                labels = [one.object["metadata"]["labels"] for one in (pod, target)]
                way = (pod.name, target.name, port_there)
                assert allowed(policies, End(labels[0]), End(labels[1]), port_there), way
                seen.add(tuple(label["app.kubernetes.io/component"] for label in labels))
        return {("engine", "engine"), ("engine", "lookup-server")} <= seen

    stack.cluster.wait("connections of engines to each other and to Redis", look, 30)


def test_a_pod_that_goes_ends_by_itself(stack: Stack) -> None:
    """Scaled down, an engine leaves by its preStop hook and vLLM's own end, well within the grace period."""
    leaving = stack.engines[-1]
    sets = [part for one in [*SMALLER, "servingEngineSpec.modelSpec[1].replicaCount=0"] for part in ("--set", one)]
    stack.act("upgrade", "vllm", CHART, "-f", SEED, *sets)
    stack.cluster.wait("end of the pod", lambda: leaving.name not in stack.cluster.pods, 100)
    assert leaving.events[-4:] == ["preStop begins", "preStop ended with 0", "SIGTERM", "ended by itself"]
    assert stack.ask(SENTENCE * 100)
