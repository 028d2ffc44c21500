"""The Python sources of vLLM versions that are not installed here, and questions to them that need no import.

`python tests/support/vllm_sources.py 0.33.0` fetches one ahead of the tests.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

FETCH_TIMEOUT_S = 600
BUILD_TOOLS = ("setuptools-rust", "setuptools-scm")
"""What vLLM's setup.py imports beyond torch and setuptools."""

Definition = ast.ClassDef | ast.FunctionDef


class UnavailableError(Exception):
    """The sources cannot be had; the message says why."""


def cached_sources(version: str) -> Path:
    """A folder that, put on the import path, is vLLM `version` without its compiled parts; fetched once (about 45 MB).

    The source archive is an eighth of the wheel. pip runs its setup.py to read the name, told to build for no device.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh" / "vllm-sources"
    folder = cache / version
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack(_download(version, Path(scratch)), Path(scratch) / "tree", version)
            try:
                (Path(scratch) / "tree").rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise somebody else was quicker
                    raise
    return folder


def _download(version: str, scratch: Path) -> Path:
    tools = scratch / "tools"
    _pip("install", "--target", str(tools), *BUILD_TOOLS)
    _pip(
        *("download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation", "-d", str(scratch)),
        f"vllm=={version}",
        env={"PYTHONPATH": str(tools), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version},
    )
    return next(scratch.glob("vllm-*.tar.gz"))


def _pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    try:
        subprocess.run(
            command,
            check=True,
            timeout=FETCH_TIMEOUT_S,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"pip {arguments[0]} took longer than {FETCH_TIMEOUT_S} s") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip().startswith("ERROR")] or ["no reason given"]
        raise UnavailableError(f"pip {arguments[0]}: {said[-1].strip()}") from error


def _unpack(archive: Path, tree: Path, version: str) -> None:
    """Only what Python imports. The metadata makes vLLM take itself for its own CPU build."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            source = tar.extractfile(member) if path.startswith("vllm/") and path.endswith(".py") else None
            if source is None or ".." in Path(path).parts:
                continue
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(source, file)
    info = tree / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


class Sources:
    """Definitions in a tree of Python files, found without importing any of them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - a handful of trees, each for the whole run
    def module(self, name: str) -> dict[str, tuple[str, ast.stmt]]:
        """Everything a module binds at its top level: name -> (module, statement)."""
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        package = name if base.is_dir() else name.rpartition(".")[0]
        bound: dict[str, tuple[str, ast.stmt]] = {}
        for statement in _flat(ast.parse(path.read_text()).body):
            for target, module in _bindings(statement, package):
                bound[target] = (module or name, statement)
        return bound

    def find(self, module: str, name: str) -> tuple[str, ast.stmt]:
        """Where `from module import name` leads. Raises LookupError when to nothing."""
        try:
            where, statement = self.module(module)[name]
        except (KeyError, FileNotFoundError) as error:
            raise LookupError(f"{module} has no {name}") from error
        if isinstance(statement, ast.ImportFrom):
            original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
            return self.find(where, original)
        return where, statement

    def has(self, module: str, name: str) -> bool:
        try:
            self.find(module, name)
        except LookupError:
            return False
        return True

    def ancestry(self, module: str, name: str) -> list[ast.ClassDef]:
        """The class and its bases inside the tree, nearest first."""
        where, node = self.find(module, name)
        if not isinstance(node, ast.ClassDef):
            raise LookupError(f"{module}.{name} is no class")  # noqa: TRY004 - what is missing is a class
        found = [node]
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.module(where):
                try:
                    found += self.ancestry(where, base.id)
                except LookupError:
                    continue  # from outside the tree
        return found

    def methods(self, module: str, name: str) -> dict[str, ast.FunctionDef]:
        found: dict[str, ast.FunctionDef] = {}
        for node in self.ancestry(module, name):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found.setdefault(item.name, item)
        return found

    def attributes(self, module: str, name: str) -> set[str]:
        """Names on the class, and those that its methods set on `self`."""
        found: set[str] = set()
        for node in self.ancestry(module, name):
            for item in node.body:
                found.update(target for target, _ in _bindings(item, ""))
            for inner in ast.walk(node):
                targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                for target in targets if isinstance(inner, ast.Assign | ast.AnnAssign) else []:
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        found.add(target.attr)
        return found

    def signature(self, module: str, dotted: str) -> inspect.Signature:
        """Of a function, a method (with `self` or `cls`), or a class's constructor (without)."""
        name, _, method = dotted.partition(".")
        if method:
            found = self.methods(module, name)
            if method not in found:
                raise LookupError(f"{module}.{name} has no {method}")
            return signature_of(found[method])
        _, node = self.find(module, name)
        if isinstance(node, ast.FunctionDef):
            return signature_of(node)
        methods = self.methods(module, name)
        if "__init__" in methods:
            made = signature_of(methods["__init__"])
            return made.replace(parameters=list(made.parameters.values())[1:])
        return inspect.Signature(list(self._fields(module, name)))

    def _fields(self, module: str, name: str) -> Iterator[inspect.Parameter]:
        """The constructor's parameters of a dataclass or named tuple."""
        fields: dict[str, inspect.Parameter] = {}
        for node in reversed(self.ancestry(module, name)):
            for item in node.body:
                if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                    continue
                text = ast.unparse(item)
                if "ClassVar" in text or "init=False" in text:
                    continue
                default = inspect.Parameter.empty if item.value is None else None
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                fields[item.target.id] = inspect.Parameter(item.target.id, kind, default=default)
        return iter(fields.values())


def signature_of(node: ast.FunctionDef) -> inspect.Signature:
    """As `inspect.signature` would give it; defaults are None."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    kind = inspect.Parameter
    parameters = []
    for index, argument in enumerate(positional):
        has_default = index >= len(positional) - len(given.defaults)
        default = None if has_default else kind.empty
        parameters.append(kind(argument.arg, kind.POSITIONAL_OR_KEYWORD, default=default))
    if given.vararg:
        parameters.append(kind(given.vararg.arg, kind.VAR_POSITIONAL))
    for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(kind(argument.arg, kind.KEYWORD_ONLY, default=kind.empty if value is None else None))
    if given.kwarg:
        parameters.append(kind(given.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def is_abstract(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "abstractmethod" for each in node.decorator_list)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, also those under `if` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)


def _bindings(statement: ast.stmt, package: str) -> Iterator[tuple[str, str | None]]:
    """Names that a statement binds, each with the module it is imported from, if it is."""
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            yield statement.name, None
        case ast.Assign():
            yield from ((target.id, None) for target in statement.targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name, None
        case ast.ImportFrom():
            parents = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
            module = ".".join([*parents, *filter(None, [statement.module])])
            yield from ((alias.asname or alias.name, module) for alias in statement.names)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(cached_sources(wanted))  # noqa: T201 - a command
