"""One configuration system for every job: typed dataclasses, presets, YAML, command line.

    python pipelines/pretrain.py --preset tiny --config my.yaml --steps 500
    python pipelines/pretrain.py --preset tiny --print-config      # what would run, as YAML

A job declares a frozen dataclass whose fields carry a type, a default and a docstring, and a
mapping of presets. Values come from the preset, then the YAML file, then the command line. An
unknown key, a wrong type or an impossible combination (a `ValueError` raised in `__post_init__`)
ends the program with exit code 2 before anything starts, naming the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import dacite
import tyro
import yaml

T = TypeVar("T")


LEFT_OUT = object()


def indifferent(default: T, *, noted: Any = LEFT_OUT) -> T:
    """A field that doesn't decide the result: where, or how fast, a job runs, or what is named by
    its content elsewhere in the fingerprint.

    Args:
        noted: What `decisive` says in its place, for results whose fingerprint has the field.
    """
    return typing.cast(T, dataclasses.field(default=default, metadata={"noted": noted}))


def later(default: T) -> T:
    """A field that was added when there were results already: at its default, under which these
    were made, it is left out of the fingerprint."""
    return typing.cast(T, dataclasses.field(default=default, metadata={"later": True}))


def decisive(config: Any) -> dict[str, Any]:
    """The options that decide a job's result, as plain values: all fields but those declared
    `indifferent`, or `later` and at their default."""
    plain, found = to_dict(config), {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if "noted" in one.metadata:
            if one.metadata["noted"] is not LEFT_OUT:
                found[one.name] = one.metadata["noted"]
        elif "later" not in one.metadata or value != one.default:
            nested = dataclasses.is_dataclass(value)
            found[one.name] = decisive(value) if nested else plain[one.name]
    return found


def cli(presets: Mapping[str, T], *, description: str, args: Sequence[str] | None = None) -> T:
    """Read a job's configuration from the command line.

    Args:
        presets: Named starting points; the first is the default.
        description: The job's purpose, for `--help`.
        args: The arguments; `sys.argv[1:]` by default.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    first.add_argument("--config", type=Path)
    first.add_argument("--print-config", action="store_true")
    chosen, rest = first.parse_known_args(sys.argv[1:] if args is None else list(args))
    if chosen.preset not in presets:
        stop(f"--preset {chosen.preset}: unknown; one of {', '.join(presets)}")
    start = presets[chosen.preset]
    if chosen.config:
        start = from_yaml(start, chosen.config)
    usage = (
        f"{description.strip()}\n\n--preset NAME starts from one of: {', '.join(presets)} "
        f"(now {chosen.preset}). --config FILE reads YAML over it. --print-config shows the result."
    )
    try:
        config = tyro.cli(type(start), default=start, args=rest, description=usage)
    except ValueError as error:
        stop(str(error))
    if chosen.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def from_yaml(start: T, file: Path) -> T:
    """Apply a YAML file on top of a configuration; stops the program if the two don't fit."""
    try:
        raw = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        stop(f"--config {file}: {error}")
    if not isinstance(raw, dict):
        stop(f"--config {file}: expected a mapping of fields, got {type(raw).__name__}")
    try:
        return from_dict(type(start), merge(to_dict(start), raw))
    except (ValueError, dacite.DaciteError) as error:
        stop(f"--config {file}: {error}")


def from_dict(kind: type[T], raw: Mapping[str, Any]) -> T:
    """Build a configuration from plain values, strictly.

    Raises:
        dacite.DaciteError: an unknown key, a missing one, or a wrong type; names the field.
        ValueError: an impossible combination.
    """
    _check_tuples(kind, raw)
    hooks = {float: _as_float, int: _as_int, Path: Path}
    settings = dacite.Config(strict=True, cast=[tuple], type_hooks=hooks)
    return dacite.from_dict(typing.cast(Any, kind), raw, settings)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists, paths strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by the values of `over`, nested mappings merged."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and scalar values, as experiment trackers want parameters."""
    flat: dict[str, Any] = {}
    for key, value in (config if isinstance(config, Mapping) else to_dict(config)).items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values from dotted names: the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested


def stop(message: str) -> NoReturn:
    """End the program: a usage error, said in one line."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _check_tuples(kind: Any, raw: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a string where a tuple belongs: dacite would cast `images: cc3m` to four letters."""
    for name, hint in typing.get_type_hints(kind).items():
        value = raw.get(name, ())
        if typing.get_origin(hint) is tuple and not isinstance(value, list | tuple):
            raise dacite.WrongTypeError(hint, value, f"{prefix}{name}")
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            _check_tuples(hint, value, f"{prefix}{name}.")


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise dacite.WrongTypeError(float, value)  # dacite adds the field's name
    return float(value)


def _as_int(value: Any) -> int:
    if isinstance(value, bool):
        raise dacite.WrongTypeError(int, value)
    return value
