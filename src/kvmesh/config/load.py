"""From sources to one checked configuration: `load_config`.

Precedence, highest first: vLLM's extra config, `KVMESH_<KEY>` in the environment, the file, the default. All problems
are gathered before one ConfigError is raised, so that a person mends them in one go.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr, ValidationError

from kvmesh.config.cluster_key import find_cluster_key
from kvmesh.config.combinations import check_combinations
from kvmesh.config.foreign import VLLM_KEYS, contradictions, is_lmcache_key, lmcache_warning
from kvmesh.config.model import KEYS, OWN_NAMES, PORT_KEYS
from kvmesh.config.resolved import KVMeshConfig
from kvmesh.config.sources import (
    CONFIG_FILE_VARIABLES,
    NESTED_KEY,
    Setting,
    read_environment,
    read_extra,
    read_yaml,
)
from kvmesh.config.values import show, split_list
from kvmesh.errors import ConfigError, ConfigProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

_MILLISECOND_NAMES = {"lookup_timeout_ms"}
_ALLOWED_KEYS = f"allowed keys: {', '.join(KEYS)}; LMCache's names for them too (docs/configuration.md)"
_EXPLAINED_ERRORS = {"value_error"}
_FOLLOWING_ERRORS = {"default_factory_not_called"}
"""Says only that a default could not be derived because another key is no good."""


@dataclass
class _Draft:
    """What has been gathered so far."""

    chosen: dict[str, Setting] = field(default_factory=dict)
    """By own name."""
    vllm: dict[str, object] = field(default_factory=dict)
    lmcache: list[str] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)
    """Own names that have a problem already, or were probably meant by an unknown key."""
    unknown: bool = False
    """Whether a key was not known, so that the known ones should be listed."""
    problems: list[ConfigProblem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load_config(
    *,
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    extra: Mapping[str, object] | None = None,
) -> KVMeshConfig:
    """Read, merge and check the configuration.

    Reads one file and the cluster key's, no network, no name resolution. Logs nothing: the caller logs `warnings` of
    the result.

    Args:
        path: the YAML file. None: the one named by KVMESH_CONFIG_FILE, else by LMCACHE_CONFIG_FILE, else none.
        environ: None: the process's environment.
        extra: vLLM's `kv_connector_extra_config`. vLLM's own keys in it are left to vLLM.

    Raises:
        ConfigError: with every problem found.
    """
    env = os.environ if environ is None else environ
    draft = _Draft()
    variable = _file_variable(env, draft) if path is None else None
    file = Path(env[variable]).expanduser() if variable else path
    in_file = [] if file is None else read_yaml(file, draft.problems, f"{variable} names it" if variable else "")
    if draft.problems and not in_file:
        draft.unsure.update(KEYS)  # the file could not be read, so what is missing is no news
    _take(draft, in_file)
    _take(draft, read_environment(env, draft.warnings), is_environment=True)
    _take(draft, read_extra(extra or {}), is_extra=True)
    _look_at_other_variables(env, draft)
    config = _with_cluster_key(_build(draft), env, draft)
    names = {own: setting.name for own, setting in draft.chosen.items()}
    problems, warnings = check_combinations(config, names, draft.unsure)
    draft.problems += problems
    if draft.problems:
        raise ConfigError(draft.problems, hint=_ALLOWED_KEYS if draft.unknown else "")
    if draft.lmcache:
        draft.warnings.append(lmcache_warning(draft.lmcache))
    said = (*draft.warnings, *warnings, *contradictions(config, draft.vllm))
    return config.model_copy(update={"warnings": said})


def _file_variable(env: Mapping[str, str], draft: _Draft) -> str | None:
    named = [variable for variable in CONFIG_FILE_VARIABLES if env.get(variable)]
    if len(named) > 1 and env[named[0]] != env[named[1]]:
        draft.warnings.append(f"{named[1]} is ignored: {named[0]} names the file")
    return named[0] if named else None


def _take(draft: _Draft, settings: list[Setting], *, is_environment: bool = False, is_extra: bool = False) -> None:
    """Put the settings of one source over those of the sources before it."""
    here: dict[str, Setting] = {}
    for setting in settings:
        if setting.value is None:
            continue  # `key:` without a value is not a value; LMCache's files say so for "not set"
        if is_extra and setting.name in VLLM_KEYS:
            draft.vllm[setting.name] = setting.value
            continue
        own = OWN_NAMES.get(setting.name)
        if own is None:
            _take_foreign(draft, setting, is_environment=is_environment)
            continue
        before = here.get(own)
        if before is not None and before.value != setting.value:
            found = f"{show(setting.value)}, and {show(before.value)} as {before.name} ({before.where})"
            draft.problems.append(ConfigProblem(setting.name, setting.where, f"one value for {own}", found))
            draft.unsure.add(own)
            continue
        here[own] = setting
    draft.chosen.update(here)


def _take_foreign(draft: _Draft, setting: Setting, *, is_environment: bool) -> None:
    if is_lmcache_key(setting.name):
        draft.lmcache.append(setting.name)
        return
    if setting.name == NESTED_KEY:
        draft.problems.append(ConfigProblem(NESTED_KEY, setting.where, "further keys, indented", show(setting.value)))
        return
    near = difflib.get_close_matches(setting.name, OWN_NAMES, n=1, cutoff=0.75 if is_environment else 0.6)
    if near:
        draft.unsure.add(OWN_NAMES[near[0]])
    elif is_environment:
        # Another program may use the prefix; a start should not fail for that. A slip of the pen is an error, as above.
        draft.warnings.append(f"{setting.where.removeprefix('env ')} is ignored: {setting.name!r} is no key")
        return
    draft.unknown = True
    hint = f"did you mean {near[0]}?" if near else ""
    draft.problems.append(ConfigProblem(setting.name, setting.where, "a known key", "an unknown one", hint))


def _look_at_other_variables(env: Mapping[str, str], draft: _Draft) -> None:
    for variable, value in sorted(env.items()):
        name = variable.removeprefix("LMCACHE_").lower()
        if value and variable.startswith("LMCACHE_") and name in OWN_NAMES:
            draft.warnings.append(f"{variable} is ignored: only KVMESH_{OWN_NAMES[name].upper()} is read")


def _build(draft: _Draft) -> KVMeshConfig:
    """Validate value by value. Keys whose value is no good get their default, so that the rest can still be checked."""
    values: dict[str, object] = {}
    port_lists: dict[str, object] = {}
    for own, setting in draft.chosen.items():
        value = setting.value
        if own in PORT_KEYS and (listed := _as_port_list(value)):
            value = listed[0]
            if len(listed) > 1:
                port_lists[own] = listed
        values[own] = _in_seconds(value) if setting.name in _MILLISECOND_NAMES else value
    sources = {own: setting.where for own, setting in draft.chosen.items()}
    try:
        return KVMeshConfig.model_validate({**values, "port_lists": port_lists, "sources": sources})
    except ValidationError as error:
        real = (details for details in error.errors(include_url=False) if details["type"] not in _FOLLOWING_ERRORS)
        # One problem per key: a bad first port of a list, for one, is met twice.
        for key, details in {_key_of(details): details for details in real}.items():
            draft.problems.append(_value_problem(draft.chosen[key], key, details))
            draft.unsure.add(key)
            values.pop(key, None)
            port_lists.pop(key, None)
    return KVMeshConfig.model_validate({**values, "port_lists": port_lists, "sources": sources})


def _with_cluster_key(config: KVMeshConfig, env: Mapping[str, str], draft: _Draft) -> KVMeshConfig:
    setting = draft.chosen.get("cluster_key_file")
    before = len(draft.problems)
    key = find_cluster_key(
        config.cluster_key_file,
        env,
        name=setting.name if setting else "cluster_key_file",
        where=setting.where if setting else "default",
        problems=draft.problems,
    )
    if len(draft.problems) > before:
        draft.unsure.add("cluster_key_file")  # meant, so that its absence is no news
    return config if key is None else config.model_copy(update={"cluster_key": SecretStr(key)})


def _as_port_list(value: object) -> list[object]:
    """The items if `value` is a list of ports (also as text, "8200,8201"), else nothing."""
    if isinstance(value, str) and ("," in value or value.strip().startswith("[")):
        value = split_list(value)
    return list(value) if isinstance(value, (list, tuple)) else []


def _in_seconds(milliseconds: object) -> object:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float, str)):
        return milliseconds
    try:
        return float(milliseconds) / 1000
    except ValueError:
        return milliseconds


def _key_of(details: ErrorDetails) -> str:
    head, *rest = details["loc"]
    return str(rest[0]) if head == "port_lists" and rest else str(head)


def _value_problem(setting: Setting, key: str, details: ErrorDetails) -> ConfigProblem:
    expected = KEYS[key].allowed
    if setting.name in _MILLISECOND_NAMES:
        expected += " (in milliseconds under this name)"
    hint = str(details["ctx"]["error"]) if details["type"] in _EXPLAINED_ERRORS and "ctx" in details else ""
    return ConfigProblem(setting.name, setting.where, expected, show(setting.value), hint)
