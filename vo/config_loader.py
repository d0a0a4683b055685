"""Reads and writes the configuration as YAML, strictly: every error names the file and the path of the key.

The dialect is YAML 1.2's core: `1e-3` is a number, `off` and `12:30` are words, only `true` and `false` are truth
values. A file holds what differs from the defaults; `--set a.b=v` changes one key and passes the same checks.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vo.config import Config
from vo.types import ConfigError

ConfigTree = TypeVar("ConfigTree")

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,999})$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
# Order matters: what looks like an integer is one.
_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


class _Reader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `1e-3` is a string and `off` is false; these resolvers read the 1.2 core schema."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]


class _Writer(yaml.SafeDumper):
    """Quotes exactly the strings that `_Reader` would take for something else; writes lists in one line."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in _SCALARS:
    _Reader.add_implicit_resolver(_tag, _pattern, _first)
    _Writer.add_implicit_resolver(_tag, _pattern, _first)
_Writer.add_representer(
    list, lambda writer, value: writer.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def preset_directory() -> Path:
    """Where the presets lie: beside this module in an installed wheel, at the top of the repository otherwise."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names that `load_config` accepts instead of a file, sorted."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file or preset (None: the defaults) with `overrides` of the form "a.b=value" applied.

    A name without a folder or suffix is a preset; a section with alternatives needs its `name:` in a file. Setting
    `SECTION.name` to another alternative gives that section the alternative's defaults.
    Raises ConfigError in one line: file, path of the key, what is valid there.
    """
    config = Config()
    if source is not None:
        path = _config_path(source)
        with _errors_from(path.name):
            config = parse_config(Config, _read_tree(_read_text(path)))
    if overrides:
        with _errors_from("--set"):
            config = parse_config(Config, _overridden_tree(config_tree(config), overrides))
    return config


def load_settings(expected: type[ConfigTree], path: Path) -> ConfigTree:
    """A file with any tree of dataclasses, as strictly. Raises ConfigError in one line that begins with its name."""
    with _errors_from(path.name):
        return parse_config(expected, _read_tree(_read_text(path)))


def dump_config(config: object) -> str:
    """YAML with every key of a tree of config dataclasses; loads back to an equal tree."""
    return yaml.dump(config_tree(config), Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100)


def config_tree(value: Any) -> Any:
    """A tree of config dataclasses as mappings, lists and scalars, in the order of the fields."""
    if is_dataclass(value):
        return {item.name: config_tree(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [config_tree(item) for item in value]
    return value


def parse_config(expected: type[ConfigTree], tree: object, path: str = "") -> ConfigTree:
    """A config dataclass from mappings, lists and scalars; keys that are absent take their defaults.

    Raises ConfigError that starts with the path of the key.
    """
    names = [item.name for item in fields(expected)]  # type: ignore[arg-type]
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'top level'}: expected a section with {', '.join(names)}, got {_described(tree)}")
    for key in tree:
        if key not in names:
            raise ConfigError(f"{_join(path, key)}: {_unknown('key', key, names)}")
    for item in fields(expected):  # type: ignore[arg-type]
        if item.name not in tree and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{_join(path, item.name)}: missing")
    hints = get_type_hints(expected)
    values = {key: _converted(hints[key], value, _join(path, key)) for key, value in tree.items()}
    try:
        return expected(**values)
    except ValueError as error:
        raise ConfigError(_located(str(error), path, names)) from None


def _converted(expected: Any, value: object, path: str) -> Any:
    """`value` as the annotated type of a field; ConfigError if it is something else."""
    origin = get_origin(expected)
    if is_dataclass(expected) and isinstance(expected, type):
        return parse_config(expected, value, path)
    if origin in (Union, types.UnionType):
        return _converted_union(get_args(expected), value, path)
    if origin is tuple:
        return _converted_tuple(get_args(expected), value, path)
    if origin is Literal:
        return _chosen(get_args(expected), value, path)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return expected(_chosen(tuple(member.value for member in expected), value, path))
    return _converted_scalar(expected, value, path)


def _converted_scalar(expected: Any, value: object, path: str) -> object:
    """A truth value, integer, finite number or string; an integer will do for a float, a truth value will not."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    if expected not in names:
        raise TypeError(f"{path}: a config field of type {expected!r} cannot be read from YAML")
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}: expected a finite number, got {value}")
        return float(value)
    if type(value) is expected:
        return value
    remedy = f'; write "{value}" in quotes' if expected is str and isinstance(value, bool | int | float) else ""
    raise ConfigError(f"{path}: expected {names[expected]}, got {_described(value)}{remedy}")


def _converted_union(members: tuple[Any, ...], value: object, path: str) -> Any:
    """None where it is allowed, else the only other member, or the dataclass whose `name` the section gives."""
    others = [member for member in members if member is not types.NoneType]
    if value is None and len(others) < len(members):
        return None
    if len(others) == 1:
        return _converted(others[0], value, path)
    alternatives = {tag: member for member in others for tag in get_args(get_type_hints(member)["name"])}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a section with name: {' | '.join(alternatives)}, got {_described(value)}")
    if "name" not in value:
        raise ConfigError(f"{_join(path, 'name')}: missing; one of {', '.join(alternatives)}")
    tag = _chosen(tuple(alternatives), value["name"], _join(path, "name"))
    return parse_config(alternatives[tag], value, path)


def _converted_tuple(members: tuple[Any, ...], value: object, path: str) -> tuple[Any, ...]:
    """A tuple from a YAML list: of any length for `tuple[T, ...]`, of exactly its length otherwise."""
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list, got {_described(value)}")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{path}: expected {len(members)} values, got {len(value)}")
    return tuple(
        _converted(member, item, f"{path}[{index}]")
        for index, (member, item) in enumerate(zip(members, value, strict=True))
    )


def _chosen(choices: tuple[Any, ...], value: object, path: str) -> Any:
    """`value` if it is one of the choices, of the same type: 1 is not true."""
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ConfigError(f"{path}: {_unknown('value', value, [str(choice) for choice in choices])}")


def _unknown(what: str, given: object, valid: Sequence[str]) -> str:
    """What to say of a key or value that is not among the valid ones, with the closest of them."""
    close = difflib.get_close_matches(str(given), valid, n=1)
    shown = "unknown key" if what == "key" else f"{_described(given)} is not valid"
    return f"{shown}; {f'did you mean {close[0]}? ' if close else ''}valid: {', '.join(valid)}"


def _located(message: str, path: str, names: Sequence[str]) -> str:
    """A dataclass's own complaint with the path in front; it begins with the field's name where one is at fault."""
    separator = "." if message.partition(":")[0] in names else ": "
    return f"{path}{separator}{message}" if path else message


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _described(value: object) -> str:
    """A value as the user wrote it, with its kind, short enough for one line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    kinds = {bool: "the truth value", int: "the integer", float: "the number", str: "the string"}
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{kinds.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"


def _config_path(source: str | Path) -> Path:
    """The file of a path or preset name; ConfigError that lists the presets if there is none."""
    path = Path(source)
    is_preset = path.suffix not in (".yaml", ".yml") and len(path.parts) <= 1 and isinstance(source, str)
    found = preset_directory() / f"{source}.yaml" if is_preset else path
    if found.is_file():
        return found
    presets = preset_names()
    close = difflib.get_close_matches(path.stem, presets, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    what = "no such preset" if is_preset else "no such configuration file"
    raise ConfigError(f"{source}: {what}; {hint}presets: {', '.join(presets)}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError("cannot be read: not UTF-8 text") from None


def _read_tree(text: str) -> object:
    """Mappings, lists and scalars of a YAML text; an empty text is an empty mapping."""
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        if node is None:
            return {}
        _check_nodes(reader, node, "", set())
        tree: object = reader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(error)) from None
    return {} if tree is None else tree


def _yaml_message(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
    line = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{line}not valid YAML: {' '.join(str(problem).split())}"


def _check_nodes(reader: _Reader, node: yaml.Node, path: str, seen: set[int]) -> None:
    """ConfigError for a key that a section gives twice (parsers keep the last one silently) and for any tag."""
    if id(node) in seen:
        return
    seen.add(id(node))
    is_plain = getattr(node, "style", None) is None
    if node.tag != reader.resolve(type(node), node.value, (is_plain, not is_plain)):  # type: ignore[no-untyped-call]
        raise ConfigError(f"line {node.start_mark.line + 1}: the tag {node.tag} is not allowed here")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_nodes(reader, item, path, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    keys: set[str] = set()
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in keys:
            raise ConfigError(f"{_join(path, key)}: given twice (again in line {key_node.start_mark.line + 1})")
        keys.add(key)
        _check_nodes(reader, key_node, path, seen)
        _check_nodes(reader, value_node, _join(path, key), seen)


def _overridden_tree(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` after "a.b=value" for each override, in order; unknown keys are left for the parser to refuse."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{override}: expected KEY=VALUE, for example pipeline.threaded=false")
        section = tree
        for depth, key in enumerate(keys[:-1]):
            child = section.get(key)
            if child is None:
                child = section[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{'.'.join(keys[: depth + 1])}: has no keys of its own, its value is {child!r}")
            section = child
        with _errors_from(path):
            value = _read_value(text)
        if keys[-1] == "name" and value != section.get("name"):
            section.clear()
        section[keys[-1]] = value
    return tree


def _read_value(text: str) -> object:
    """The value of an override; nothing after the equals sign is null."""
    tree = _read_tree(text)
    return None if tree == {} and not text.strip().startswith("{") else tree


@contextmanager
def _errors_from(origin: str) -> Iterator[None]:
    """Puts `origin` in front of the ConfigError that the block may raise."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
