from __future__ import annotations

import pickle
import re

import pytest

from kvmesh import errors

EXAMPLES = [
    errors.ConfigError([errors.ConfigProblem("chunk_size", "a.yaml:1", "a number", "'x'", "mend it")], hint="all keys"),
    errors.StartupError("peer port 8200", "a free port", "address in use", "set peer_port: 0"),
    errors.VersionError("vLLM", "0.31 to 0.33", "0.40"),
    errors.UnsupportedError("pool over two hosts"),
    errors.FormatMismatch("dtype", "bfloat16", "float16", peer="b"),
    errors.PeerTimeoutError("b at 10.0.0.2:8200", "a byte within 1 s", "none"),
    errors.LocalProtocolError("b", found="a second hello"),
    errors.DirectoryRefusedError("controller", "an id of its own", "'a', which is taken"),
    errors.ApiRefusedError("controller", "no member has the id 'x'", "list them", 404, "unknown_instance"),
    errors.TransferError("nixl agent", found="NIXL_ERR_BACKEND"),
    errors.LedgerError("ledger", "magic KVML", "0x0"),
]


def all_classes(root: type[Exception]) -> list[type[Exception]]:
    """The tree below `root`; modules may have private classes of their own in it."""
    below = [one for child in root.__subclasses__() for one in all_classes(child)]
    return [root, *(one for one in below if not one.__name__.startswith("_"))]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: errors.KVMeshError) -> None:
    """An error that crosses from the node to the engine says the same on the other side."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_message_has_all_four_parts() -> None:
    """Thing, expected, found and hint make one sentence."""
    error = errors.StartupError("peer port 8200", "a free port", "address in use", "set peer_port: 0")
    assert str(error) == "peer port 8200: expected a free port, found address in use; set peer_port: 0"
    assert str(errors.UnsupportedError("pool over two hosts")) == "pool over two hosts"


def test_config_error_lists_every_problem() -> None:
    problems = [errors.ConfigProblem(key, "env", "x", "y") for key in ("a", "b")]
    text = str(errors.ConfigError(problems))
    assert "2 problems" in text
    assert "a (env): expected x, found y" in text
    assert "b (env): expected x, found y" in text


def test_tree_in_the_docstring_is_the_tree() -> None:
    """The module's docstring names every class, under its true parent."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([ |`-]*)(\w+)  ", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [(d, n) for d, n in above if d < depth]
        drawn[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    assert drawn == {cls.__name__: cls.__mro__[1].__name__ for cls in all_classes(errors.KVMeshError)}


def test_everything_is_exported() -> None:
    public = {cls.__name__ for cls in all_classes(errors.KVMeshError)} | {"ConfigProblem"}
    assert set(errors.__all__) == public
