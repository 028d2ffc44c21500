"""NetworkPolicies let exactly the traffic through that is needed: every pair of pods, every port."""

from __future__ import annotations

from itertools import product

import pytest

from support.helm import CHART, EXAMPLES, SEED, Helm, Manifest, Result
from support.network_policies import OUTSIDE, End, allowed

PORTS = (53, 443, 6443, 6379, 8000, 8080, 8082, 8200, 8201, 8300, 8400, 8500, 8510, 9000, 22)
STRANGER = End({"app": "stranger"})
MONITORING = End({}, {"kubernetes.io/metadata.name": "monitoring"})


def ends(result: Result) -> dict[str, End]:
    """One pod per component; `helm test` too."""
    found = {"stranger": STRANGER, "outside": OUTSIDE, "monitoring": MONITORING}
    for manifest in result.manifests:
        template: Manifest | None = None
        if manifest["kind"] in {"Deployment", "StatefulSet"}:
            template = manifest["spec"]["template"]["metadata"]
        elif manifest["kind"] == "Pod":
            template = manifest["metadata"]
        if template is not None:
            found[template["labels"]["app.kubernetes.io/component"]] = End(template["labels"])
    return found


def open_ways(result: Result) -> set[tuple[str, str, int]]:
    policies = [one for one in result.manifests if one["kind"] == "NetworkPolicy"]
    them = ends(result)
    return {
        (source, target, port)
        for (source, target), port in product(product(them, them), PORTS)
        if {source, target} - {"stranger", "outside", "monitoring"}
        and allowed(policies, them[source], them[target], port)
    }


def to_ours(ways: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    return {way for way in ways if way[1] not in {"stranger", "outside", "monitoring"} and way[0] != "test"}


def test_redis(any_helm: Helm) -> None:
    """The tutorial's file: peers on two ports, Redis for engines only, engines for the router only."""
    result = any_helm.render(SEED)
    anybody = {("stranger", "router", 8000), ("outside", "router", 8000), ("monitoring", "router", 8000)}
    assert to_ours(open_ways(result)) - anybody == {
        ("engine", "engine", 8200),
        ("engine", "engine", 8201),
        ("engine", "lookup-server", 8080),
        ("router", "engine", 8000),
        # Every pod may ask the router, as everybody may; engines and lookup server have no reason and no way to.
    }


def test_controller(any_helm: Helm) -> None:
    """Control sockets for engines only; the API for the router, and nobody else."""
    ways = to_ours(open_ways(any_helm.render(EXAMPLES / "values-controller.yaml")))
    assert {way for way in ways if way[1] == "controller"} == {
        ("engine", "controller", 8300),
        ("engine", "controller", 8400),
        ("engine", "controller", 8082),
        ("engine", "controller", 9000),
        ("router", "controller", 9000),
    }
    assert {way for way in ways if way[1] == "engine"} == {("engine", "engine", 8200), ("router", "engine", 8000)}


def test_clients_and_monitoring_can_be_named(any_helm: Helm) -> None:
    """Then nobody else reaches the router, and metrics are for the monitoring's namespace."""
    ways = open_ways(any_helm.render(EXAMPLES / "values-full.yaml"))
    assert ("stranger", "router", 8000) not in ways
    assert ("outside", "router", 8000) not in ways
    assert {("monitoring", "engine", 8500), ("monitoring", "engine", 8000), ("monitoring", "controller", 9000)} <= ways
    assert ("monitoring", "engine", 8200) not in ways


def test_nothing_calls_out_but_what_must(any_helm: Helm) -> None:
    """Redis and the controller call nobody; engines fetch weights by HTTPS; the router calls the API server."""
    outwards = {}
    for values in (SEED, EXAMPLES / "values-controller.yaml"):
        for source, target, port in open_ways(any_helm.render(values)):
            if target == "outside":
                outwards.setdefault(source, set()).add(port)
    assert "lookup-server" not in outwards
    assert "controller" not in outwards
    assert outwards["engine"] == {53, 443}
    assert outwards["router"] == {53, 443, 6443}


@pytest.mark.parametrize("values", [SEED, EXAMPLES / "values-controller.yaml"], ids=lambda path: path.stem)
def test_helm_test_reaches_the_engines(any_helm: Helm, values: object) -> None:
    ways = open_ways(any_helm.render(values))  # type: ignore[arg-type]
    assert ("test", "engine", 8000) in ways
    assert {way for way in ways if way[0] == "test" and way[1] == "lookup-server"} == set()


def test_two_releases_do_not_reach_each_other(any_helm: Helm) -> None:
    ours, theirs = (Result(0, any_helm.run("template", name, "-f", SEED, CHART).out, "") for name in ("one", "two"))
    policies = [one for result in (ours, theirs) for one in result.manifests if one["kind"] == "NetworkPolicy"]
    assert not allowed(policies, ends(ours)["engine"], ends(theirs)["engine"], 8200)
    assert not allowed(policies, ends(ours)["engine"], ends(theirs)["lookup-server"], 8080)
    assert allowed(policies, ends(ours)["engine"], ends(ours)["engine"], 8200)
