"""Configs: `file.py:k=v,k=v` arguments, strict keys, frozen dataclasses, and the copy kept in a workdir.

A config file has `get_config(arg) -> ConfigDict`; every key that the program reads is visible in it. The part of a
config that describes a module becomes a frozen dataclass by `to_dataclass`, which rejects what it does not know.
"""

import dataclasses
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from etils import epath
from ml_collections import ConfigDict

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.runtime import filesystem
from imagegpt_jax.weight_files import files

T = TypeVar("T")
# A ConfigDict to a reader, and no type to a checker: which keys it has is known when the config file has run.
Config: TypeAlias = Any

# Keys that change what is shown or kept, or only the order of sums: they may differ when a run is continued.
_HARMLESS = {"mesh", "topology", "log_every", "eval_every", "eval_samples", "eval_features", "sampling", "checkpoint"}


def parse_arg(arg: str | None, **defaults: Any) -> Config:
    """Parses the `k=v,k=v` part of `--config=file.py:k=v,k=v`; types follow the defaults.

    Raises:
      UserError: for an unknown key, or a value that is not of its default's type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}.{suggest(key, defaults)}")
        if not equals:
            raise UserError(f"config argument {key!r} needs a value: write {key}={defaults[key]!r}.")
        values[key] = _as_type(key, text, type(defaults[key]))
    return ConfigDict(values)


def _as_type(key: str, text: str, kind: type) -> Any:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UserError(f"config argument {key}={text!r} is not a {kind.__name__}.") from None


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """Returns `table[name]`; an unknown name is a UserError with a suggestion."""
    if name not in table:
        hint = suggest(name, table)
        raise UserError(f"unknown {what} {name!r}.{hint}" + f" All: {', '.join(table)}." * ("?" in hint))
    return table[name]


def sibling(config_file: str, name: str) -> types.ModuleType:
    """Imports the config file `name` that lies beside `config_file`, wherever the program is run from."""
    path = pathlib.Path(config_file).with_name(name)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_dataclass(cls: type[T], mapping: Mapping[str, Any] | ConfigDict) -> T:
    """Builds the (nested) frozen dataclass `cls` from a mapping.

    Raises:
      UserError: for a key that `cls` does not have, or a required key that is missing.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise UserError(f"{cls.__name__} has no key {key!r}.{suggest(key, fields)}")
        values[key] = _convert(hints[key], value)
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := [name for name in fields if name in required - values.keys()]:
        raise UserError(f"{cls.__name__} needs the keys {', '.join(missing)}.")
    return cls(**values)


def _convert(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping | ConfigDict):
        return to_dataclass(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(value)
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts and lists, equal to itself after a round trip through JSON."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ in meaning, one "key: old -> new" each, without the harmless ones.

    A new value of None is what the run took from its data when it began, so it differs from nothing.
    """
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key, '(absent)')!r} -> {b.get(key, '(absent)')!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, ...) != b.get(key, ...) and key.split(".")[0] not in _HARMLESS and b.get(key, ...) is not None
    ]


def check_workdir(config: Config, workdir: epath.PathLike, *, allow_changes: bool = False) -> list[str]:
    """Checks that a workdir is new, or holds a run of this config; with `allow_changes` of any config.

    Returns:
      what differs from the config that the workdir's run had, one "key: old -> new" each.

    Raises:
      UserError: if it holds a run of another config, or something that is not a run.
    """
    folder = epath.Path(workdir)
    path = folder / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as e:
            raise UserError(
                f"{path} is damaged ({e}): bring back a copy of it; each checkpoint's manifest has one."
            ) from e
        changes = diff(old, to_dict(config))
        if changes and not allow_changes:
            shown = "; ".join(changes[:6]) + ("; ..." if len(changes) > 6 else "")
            raise UserError(
                f"{folder} holds a run of another config ({shown}):"
                " choose another --workdir, give the same config to continue, or --allow_config_change to go on"
                " with the new one."
            )
        return changes
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no workdir of a run: choose another --workdir, or an empty folder.")
    return []


def take_stored(config: Config, workdir: epath.PathLike) -> Config:
    """A copy of the config in which what is None has the value of the workdir's run, which took it from its data."""
    stored, config = flatten(to_dict(load(workdir))), config.copy_and_resolve_references()
    with config.unlocked():
        for key, value in flatten(config.to_dict()).items():
            if value is None and stored.get(key) is not None:
                config.update_from_flattened_dict({key: _convert(tuple[Any], stored[key])})
    return config


def to_text(config: Config) -> str:
    """The config as JSON, a key a line."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def save(config: Config, workdir: epath.PathLike) -> None:
    """Writes `config.json` into the workdir, whole or not at all."""
    filesystem.write_whole(epath.Path(workdir) / "config.json", to_text(config))


def load(workdir: epath.PathLike) -> Config:
    """Reads the config of a workdir; of weights that no run of ours trained it is `task` = "weights" alone.

    Raises:
      UserError: if the folder is not a workdir of ours, and holds no weights.
    """
    folder, local = epath.Path(workdir).expanduser(), pathlib.Path(workdir).expanduser()
    if files.holds_weights(local):
        about = local / "config.json"
        run = json.loads(about.read_text()).get("run") if about.is_file() else None
        return ConfigDict(run or {"task": "weights"})
    if not folder.exists():
        raise UserError(f"there is no folder {folder}: give the --workdir of a training run.")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json: give the --workdir of a training run.")
    return ConfigDict(json.loads((folder / "config.json").read_text()))
