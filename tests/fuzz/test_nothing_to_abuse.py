"""What must not be in the code at all: ways from a byte on a socket to code, to files, or to the environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmesh

ROOT = Path(kvmesh.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FACING_THE_NETWORK = ("wire", "core", "controller", "directory", "node", "transfer")
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
OPENS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "unlink",
    "mkdir",
    "rmtree",
    "rename",
    "symlink",
}
ALLOWED_OPENS = {
    # These only share the name: windows for a peer's messages, pages and dialogs, links, sealed values.
    ("controller/fanout.py", "open"),
    ("controller/redis_watch.py", "open"),
    ("controller/registry.py", "open"),
    ("controller/ui/operations.py", "open"),
    ("controller/ui/site.py", "open"),
    ("directory/redis_client.py", "open"),
    ("directory/redis_follower.py", "open"),
    ("directory/redis_publisher.py", "open"),
    # A password's file, named by the configuration.
    ("directory/redis_link.py", "read_text"),
    # Our own descriptors once more, for reading only.
    ("transfer/shm_holder.py", "open"),
}
WRITES_PICKLE = "core/block_hashes.py"
"""vLLM hashes pickled tuples by default, and we have to hash the same bytes. Nothing is ever read from them."""


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            yield node.func.id, node
        elif isinstance(node.func, ast.Attribute):
            yield node.func.attr, node


def is_ours(file: Path, name: str, call: ast.Call) -> bool:
    """`re.compile` and the like, which share only the name with what is meant."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(owner, ast.Name) and (owner.id, name) in {("re", "compile"), ("platform", "system")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_pickle_no_eval(file: Path) -> None:
    """No module that turns bytes into code, no call that does, no shell, no YAML beyond plain values."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        forbidden = {name.split(".")[0] for name in names} & MODULES
        assert not forbidden or (forbidden == {"pickle"} and file == ROOT / WRITES_PICKLE)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            assert node.attr in {"dumps", "HIGHEST_PROTOCOL"}
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"UnsafeLoader", "FullLoader", "unsafe_load", "full_load"}
            assert not (node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "yaml")
    found = {name for name, call in calls(file) if name in CALLS and not is_ours(file, name, call)}
    assert not found


@pytest.mark.parametrize("package", FACING_THE_NETWORK)
def test_what_faces_the_network_opens_no_files(package: str) -> None:
    """So no path from the wire is ever opened; the HTTP server serves the page from its own package."""
    found = {
        (str(file.relative_to(ROOT)), name)
        for file in sorted((ROOT / package).rglob("*.py"))
        for name, _ in calls(file)
        if name in OPENS
    }
    assert found <= ALLOWED_OPENS


@pytest.mark.parametrize("package", FACING_THE_NETWORK)
def test_what_faces_the_network_does_not_hand_out_the_environment(package: str) -> None:
    """`os.environ` is only ever asked for, or given, single names."""
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text())
        uses = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in {"environ", "environb"}
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        ]
        single = {
            id(node.value)
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute) and node.attr in {"get", "setdefault"})
            or isinstance(node, ast.Subscript)
        }
        assert all(id(use) in single for use in uses), file
