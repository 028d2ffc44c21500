"""Reading settings from a YAML file, the environment and vLLM's extra config: names, values and places, nothing judged.

The file is read node by node instead of with `yaml.safe_load`, because only nodes know their line, and because
`safe_load` takes the last of two equal keys without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from kvmesh.config.cluster_key import CLUSTER_KEY_VARIABLE
from kvmesh.errors import ConfigProblem

if TYPE_CHECKING:
    from pathlib import Path

    import yaml

ENV_PREFIX = "KVMESH_"
CONFIG_FILE_VARIABLES = ("KVMESH_CONFIG_FILE", "LMCACHE_CONFIG_FILE")
"""Variables that name the file, the first one that is set."""

CONTROLLER_VARIABLE = "KVMESH_CONTROLLER"
CONTROLLER_CA_VARIABLE = "KVMESH_CONTROLLER_CA"
"""Where the command line finds the controller's HTTP API, and the CA of its certificate."""

_NO_KEYS = frozenset({*CONFIG_FILE_VARIABLES, CLUSTER_KEY_VARIABLE, CONTROLLER_VARIABLE, CONTROLLER_CA_VARIABLE})
"""Variables with our prefix that are no keys of the configuration and are not to be warned about."""

MAX_FILE_BYTES = 1 << 20
NESTED_KEY = "extra_config"
"""LMCache's key whose mapping holds further keys. They count as if they stood at the top."""

_KUBERNETES_LINK = re.compile(r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?$")
_KUBERNETES_PORT_VALUE = re.compile(r"^(tcp|udp|sctp)://")


class _Nested:
    """Stands for a value that is built of lists and mappings. Not valid for any key."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind


class Setting(NamedTuple):
    """One key as somebody wrote it."""

    name: str
    value: object
    where: str


def read_yaml(path: Path, problems: list[ConfigProblem], hint: str = "") -> list[Setting]:
    """The settings of a YAML file in their order.

    Whatever is wrong with the file goes to `problems`, with `hint` if it cannot be read at all.
    """
    import yaml  # noqa: PLC0415 - a node gets its configuration over a pipe and never reads YAML

    file = str(path)
    text = _read_text(path, problems, hint)
    if text is None:
        return []
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == "tag:yaml.org,2002:null"):
            return []
        if not isinstance(root, yaml.MappingNode):
            problems.append(ConfigProblem("file", file, "lines of the form `key: value`", _node_kind(root)))
            return []
        return list(_settings(loader, root, file, problems))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        problems.append(ConfigProblem("file", where, "valid YAML", error.problem or "something else"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(ConfigProblem("file", file, "valid YAML", f"{type(error).__name__}: {str(error)[:200]}"))
    return []


def _read_text(path: Path, problems: list[ConfigProblem], hint: str) -> str | None:
    expected = f"a readable YAML file of at most {MAX_FILE_BYTES} bytes"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            problems.append(ConfigProblem("file", str(path), expected, "a longer one", hint))
            return None
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.append(ConfigProblem("file", str(path), "text in UTF-8", "other bytes", hint))
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        problems.append(ConfigProblem("file", str(path), expected, found, hint))
    return None


def _settings(
    loader: yaml.SafeLoader, mapping: yaml.MappingNode, file: str, problems: list[ConfigProblem]
) -> Iterator[Setting]:
    import yaml  # noqa: PLC0415 - see read_yaml

    seen: dict[str, str] = {}
    for key_node, value_node in mapping.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(ConfigProblem("file", where, "lines of the form `key: value`", _node_kind(key_node)))
            continue
        name = str(key_node.value)
        if name in seen:
            problems.append(ConfigProblem(name, where, "each key once", f"a second one, after {seen[name]}"))
            continue
        seen[name] = where
        if name == NESTED_KEY and isinstance(value_node, yaml.MappingNode):
            yield from _settings(loader, value_node, file, problems)
            continue
        yield Setting(name, _value(loader, value_node), where)


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    """A plain value or a list of them. Deeper ones, which no key takes, are not built: they may hold themselves."""
    import yaml  # noqa: PLC0415 - see read_yaml

    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if all(isinstance(item, yaml.ScalarNode) for item in items):
        return loader.construct_object(node, deep=True)
    return _Nested(_node_kind(node))


def _node_kind(node: yaml.Node) -> str:
    import yaml  # noqa: PLC0415 - see read_yaml

    if isinstance(node, yaml.ScalarNode):
        return "plain text"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def read_extra(extra: Mapping[str, object]) -> list[Setting]:
    """The settings in vLLM's `kv_connector_extra_config`. `kvmesh.` and `lmcache.` before a key are taken off."""
    settings: list[Setting] = []
    for key, value in extra.items():
        name = str(key).removeprefix("kvmesh.").removeprefix("lmcache.")
        if name == NESTED_KEY and isinstance(value, Mapping):
            settings += [Setting(str(inner), inner_value, "extra") for inner, inner_value in value.items()]
            continue
        settings.append(Setting(name, value, "extra"))
    return settings


def read_environment(environ: Mapping[str, str], warnings: list[str]) -> list[Setting]:
    """The settings in `KVMESH_<KEY>` variables. Empty ones count as not set, as everywhere in shells."""
    settings = []
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in _NO_KEYS or not value:
            continue
        if _is_kubernetes_link(variable, value):
            warnings.append(
                f"{variable} is ignored: it looks like one of those that Kubernetes sets for a service of that name; "
                "enableServiceLinks: false in the pod keeps them out"
            )
            continue
        settings.append(Setting(variable.removeprefix(ENV_PREFIX).lower(), value, f"env {variable}"))
    return settings


def _is_kubernetes_link(variable: str, value: str) -> bool:
    if _KUBERNETES_LINK.search(variable):
        return True
    return variable.endswith("_PORT") and _KUBERNETES_PORT_VALUE.match(value) is not None
