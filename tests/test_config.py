"""The strict loader: what it accepts, how it refuses the rest, and that what it writes it reads back."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from frontends.base import check_settings, setting
from vo import config_loader
from vo.config import Config
from vo.config_loader import (
    config_tree,
    dump_config,
    load_config,
    parse_config,
    preset_directory,
    preset_names,
)
from vo.types import ConfigError


class Shape(Enum):
    ROUND = "round"
    SQUARE = "square"


@dataclass(frozen=True, slots=True)
class Alpha:
    name: Literal["alpha"] = "alpha"
    gain: float = setting(1.0, minimum=0.0, maximum=10.0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class Beta:
    name: Literal["beta", "beta-2"] = "beta"
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, slots=True)
class Tree:
    """One field of every kind the loader knows."""

    flag: bool = False
    count: int = setting(3, minimum=1, maximum=9)
    ratio: float = 0.5
    word: str = setting("a", choices=("a", "b", "off"))
    text: str = ""
    limit: int | None = None
    span: tuple[float, float] = (0.0, 1.0)
    shape: Shape = Shape.ROUND
    part: Alpha | Beta = field(default_factory=Alpha)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.span[0] > self.span[1]:
            raise ValueError(f"span: {self.span[0]} is above {self.span[1]}")


@dataclass(frozen=True, slots=True)
class Demanding:
    size: int


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(text: str) -> Tree:
    """A `Tree` from YAML text, through the same reader as `load_config`."""
    return parse_config(Tree, config_loader._read_tree(text))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("ratio: 1e-3", "ratio", 1e-3),
        ("ratio: -2E5", "ratio", -2e5),
        ("ratio: .5", "ratio", 0.5),
        ("ratio: 7", "ratio", 7.0),
        ("word: off", "word", "off"),
        ("text: yes", "text", "yes"),
        ("text: 12:30:00", "text", "12:30:00"),
        ("text: 2026-11-20", "text", "2026-11-20"),
        ('text: "1e-3"', "text", "1e-3"),
        ("text: tcp://127.0.0.1:5570", "text", "tcp://127.0.0.1:5570"),
        ("flag: true", "flag", True),
        ("limit: null", "limit", None),
        ("limit: ~", "limit", None),
        ("limit: 4", "limit", 4),
        ("span: [0, 1e1]", "span", (0.0, 10.0)),
        ("shape: square", "shape", Shape.SQUARE),
        ("part: {name: beta, sizes: [3]}", "part", Beta(sizes=(3,))),
        ("part: {name: beta-2}", "part", Beta(name="beta-2")),
    ],
)
def test_reads(text: str, name: str, value: object) -> None:
    result = getattr(loaded(text), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cout: 3", "cout: unknown key; did you mean count? valid: flag, count, ratio,"),
        ("zzz: 3", "zzz: unknown key; valid: flag, count,"),
        ("1: 3", "1: unknown key"),
        ("part: {name: alpha, gian: 2}", "part.gian: unknown key; did you mean gain? valid: name, gain"),
        ("part: {name: alpha, sizes: [3]}", "part.sizes: unknown key; valid: name, gain"),
        ("part: {gain: 2}", "part.name: missing; one of alpha, beta, beta-2"),
        (
            "part: {name: alfa}",
            "part.name: the string 'alfa' is not valid; did you mean alpha? valid: alpha, ",
        ),
        ("part: alpha", "part: expected a section with name: alpha | beta | beta-2, got the string 'alpha'"),
        ("part: null", "part: expected a section"),
        ("count: 2.0", "count: expected an integer, got the number 2.0"),
        ("count: true", "count: expected an integer, got the truth value true"),
        ("count: '3'", "count: expected an integer, got the string '3'"),
        ("count: 010", "count: expected an integer"),
        ("count: 1_0", "count: expected an integer, got the string '1_0'"),
        ("count: 0x1F", "count: expected an integer"),
        ("count: null", "count: expected an integer, got nothing (null)"),
        ("count:", "count: expected an integer, got nothing (null)"),
        ("count: 0", "count: 0 is below 1"),
        ("count: 10", "count: 10 is above 9"),
        ("part: {name: alpha, gain: 11}", "part.gain: 11.0 is above 10.0"),
        ("ratio: true", "ratio: expected a number, got the truth value true"),
        ("ratio: fast", "ratio: expected a number, got the string 'fast'"),
        ("ratio: .nan", "ratio: expected a finite number, got nan"),
        ("ratio: 1e999", "ratio: expected a finite number, got inf"),
        ("flag: 1", "flag: expected true or false, got the integer 1"),
        ("flag: off", "flag: expected true or false, got the string 'off'"),
        ("word: c", "word: 'c' is not one of a, b, off"),
        ("text: 3", 'text: expected a string, got the integer 3; write "3" in quotes'),
        ("limit: 1.5", "limit: expected an integer, got the number 1.5"),
        ("span: 3", "span: expected a list, got the integer 3"),
        ("span: [1]", "span: expected 2 values, got 1"),
        ("span: [0, x]", "span[1]: expected a number, got the string 'x'"),
        ("span: [2, 1]", "span: 2.0 is above 1.0"),
        ("shape: oval", "shape: the string 'oval' is not valid; valid: round, square"),
        ("- 1", "top level: expected a section with flag,"),
        ("count: 2\ncount: 3", "count: given twice (again in line 2)"),
        ("part:\n  name: alpha\n  gain: 1\n  gain: 2", "part.gain: given twice (again in line 4)"),
        ("count: [1", "line 1: not valid YAML: "),
        ("count: 1\n\tratio: 2", "line 2: not valid YAML: "),
        ("a: 1\n---\nb: 2", "not valid YAML: "),
        (
            "text: !!python/object:os.system x",
            "line 1: the tag tag:yaml.org,2002:python/object:os.system is not allowed",
        ),
        ("ratio: !!float x", "line 1: the tag tag:yaml.org,2002:float is not allowed"),
        ("span:\n  - !!timestamp 1\n", "line 2: the tag"),
        ("a: &a [*a]", "a: unknown key"),
        ("? [a]\n: 1", "line 1: not valid YAML: found unhashable key"),
        ("text: \x07", "not valid YAML: special characters are not allowed"),
        ("<<: {count: 3}", "<<: unknown key"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_without_default_is_missed_by_path() -> None:
    with pytest.raises(ConfigError, match=r"^deep\.size: missing$"):
        parse_config(Demanding, {}, "deep")
    assert parse_config(Demanding, {"size": 2}) == Demanding(2)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == load_config() == Config()
    assert load_config(write(tmp_path, "# nothing\n---\n")) == Config()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^mine\.yaml: pipeline\.treaded: unknown key; did you mean threaded\? valid"
    ):
        load_config(write(tmp_path, "pipeline: {treaded: true}"))
    with pytest.raises(ConfigError, match=r"^mine\.yaml: pipeline\.channel_capacity: 9 is above 8$"):
        load_config(write(tmp_path, "pipeline: {channel_capacity: 9}"))
    with pytest.raises(ConfigError, match=r"^mine\.yaml: two_view\.method: 'x' is not one of usac_fast"):
        load_config(write(tmp_path, "two_view: {method: x}"))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^binary\.yaml: cannot be read: not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file; .*presets: .*kitti"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"^kiti: no such preset; did you mean kitti\? presets: "):
        load_config("kiti")
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path)


def test_overrides() -> None:
    config = load_config(None, ["pipeline.threaded=false", "two_view.threshold_px=2", "two_view.method=ransac"])
    assert (config.pipeline.threaded, config.two_view.threshold_px, config.two_view.method) == (False, 2.0, "ransac")
    assert (
        load_config(None, ["pipeline.channel_capacity=1", "pipeline.channel_capacity=4"]).pipeline.channel_capacity == 4
    )
    assert load_config(None, ["pipeline={channel_capacity: 5}"]).pipeline.channel_capacity == 5


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "pipeline: {channel_capacity: 3, policy: latest}")
    config = load_config(path, ["pipeline.channel_capacity=4"])
    assert (config.pipeline.channel_capacity, config.pipeline.policy) == (4, "latest")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pipeline.threaded", "--set: pipeline.threaded: expected KEY=VALUE"),
        ("=3", "--set: =3: expected KEY=VALUE"),
        ("pipeline..threaded=true", "expected KEY=VALUE"),
        ("pipeline.treaded=true", "--set: pipeline.treaded: unknown key; did you mean threaded? valid: "),
        ("pipe.threaded=true", "--set: pipe: unknown key; did you mean pipeline? valid: "),
        ("pipeline.threaded=yes", "--set: pipeline.threaded: expected true or false, got the string 'yes'"),
        ("pipeline.threaded=", "--set: pipeline.threaded: expected true or false, got nothing (null)"),
        ("pipeline.threaded.x=1", "--set: pipeline.threaded: has no keys of its own, its value is True"),
        ("pipeline.channel_capacity=0", "--set: pipeline.channel_capacity: 0 is below 1"),
        ("pipeline.channel_capacity=[", "--set: pipeline.channel_capacity: line 1: not valid YAML"),
        ("two_view.method=3", 'two_view.method: expected a string, got the integer 3; write "3" in quotes'),
    ],
)
def test_overrides_are_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_presets_load_and_say_why() -> None:
    assert {"default", "kitti", "tum", "euroc", "webcam", "fast-cpu", "accurate", "orb", "xfeat"} <= set(preset_names())
    for name in preset_names():
        load_config(name)
        text = (preset_directory() / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("#"), f"{name}.yaml does not say what it is for"
    assert load_config("default") == Config()


def test_presets_of_an_installed_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wheel the presets lie inside the package, in a checkout beside it."""
    module = tmp_path / "vo" / "config_loader.py"
    monkeypatch.setattr(config_loader, "__file__", str(module))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("pipeline: {channel_capacity: 3}\n")
    assert load_config("mine").pipeline.channel_capacity == 3
    (tmp_path / "vo" / "configs").mkdir(parents=True)
    (tmp_path / "vo" / "configs" / "mine.yaml").write_text("pipeline: {channel_capacity: 4}\n")
    assert load_config("mine").pipeline.channel_capacity == 4
    assert preset_names() == ["mine"]


def test_presets_hold_only_what_differs() -> None:
    """A key that repeats the default hides which choices a preset makes; default.yaml is there to show them."""
    for name in set(preset_names()) - {"default"}:
        tree = yaml.safe_load((preset_directory() / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        baseline = parse_config(Config, names_only(tree))
        same = [path for path, value in leaves(tree) if leaf(baseline, path) == value and path[-1] != "name"]
        assert not same, f"{name}.yaml repeats defaults: {same}"


def names_only(tree: dict[str, Any]) -> dict[str, Any]:
    """Which alternatives a file chooses, and nothing else."""
    kept = {key: names_only(value) for key, value in tree.items() if isinstance(value, dict)}
    return {**kept, **({"name": tree["name"]} if "name" in tree else {})}


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in tree.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def leaf(config: object, path: tuple[str, ...]) -> object:
    for key in path:
        config = getattr(config, key)
    return config_tree(config)


# What the property tests draw from: any type a config field may have, within the limits of its `setting`.

WORDS = st.sampled_from(
    ["", "off", "null", "~", "true", "1e-3", "010", "1:30", "0x1f", ": #", "- a", "é 中", "a\nb", ".5"]
)


def values(hint: Any, item: Field[Any]) -> st.SearchStrategy[Any]:
    limits = item.metadata
    if limits and limits["choices"]:
        return st.sampled_from(limits["choices"])
    if is_dataclass(hint) and isinstance(hint, type):
        return trees(hint)
    origin = get_origin(hint)
    if origin is Literal:
        return st.sampled_from(get_args(hint))
    if origin is UnionType:
        return st.one_of([st.none() if member is NoneType else values(member, item) for member in get_args(hint)])
    if origin is tuple:
        return tuples(get_args(hint), item)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    return scalars(hint, item)


def tuples(members: tuple[Any, ...], item: Field[Any]) -> st.SearchStrategy[Any]:
    if len(members) == 2 and members[1] is Ellipsis:
        return st.lists(values(members[0], item), max_size=3).map(tuple)
    return st.tuples(*[values(member, item) for member in members])


def scalars(hint: Any, item: Field[Any]) -> st.SearchStrategy[Any]:
    limits = item.metadata or {"minimum": None, "maximum": None}
    low, high = limits["minimum"], limits["maximum"]
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(low, high)
    if hint is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    assert hint is str, f"no strategy for {hint}"
    return WORDS | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


def trees(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    drawn = st.fixed_dictionaries({}, optional={item.name: values(hints[item.name], item) for item in fields(kind)})
    return drawn.map(lambda chosen: built(kind, chosen))


def built(kind: type[Any], chosen: dict[str, Any]) -> Any:
    """One dataclass; a draw that breaks a rule between two fields does not count."""
    try:
        return kind(**chosen)
    except ValueError:
        assume(False)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
@given(trees(Tree))
def test_every_tree_survives_yaml(tree: Tree) -> None:
    assert loaded(dump_config(tree)) == tree


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(config=trees(Config))
def test_every_config_survives_its_file(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")))
def test_any_text_loads_or_fails_in_one_line(text: str) -> None:
    try:
        loaded(text)
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 1


def test_every_setting_says_what_it_is() -> None:
    """Help, and a type that YAML can write, on every field of the whole tree."""
    for path, item in described(Config):
        assert item.metadata.get("help"), f"{path} has no help"
        if isinstance(item.default, float):
            assert item.metadata["minimum"] is not None or item.metadata["maximum"] is not None, f"{path} has no limit"


def described(kind: type[Any], path: str = "") -> list[tuple[str, Field[Any]]]:
    """Every scalar field below a config dataclass with its path."""
    found: list[tuple[str, Field[Any]]] = []
    for item in fields(kind):
        hint = get_type_hints(kind)[item.name]
        members = [member for member in (*get_args(hint), hint) if is_dataclass(member) and isinstance(member, type)]
        for member in members:
            found += described(member, f"{path}{item.name}.")
        if not members and item.name != "name":
            assert item.default is not MISSING, f"{path}{item.name} has no default"
            found.append((f"{path}{item.name}", item))
    return found


def test_dump_lists_every_key_once() -> None:
    text = dump_config(Config())
    assert re.search(r"^pipeline:\n  threaded: true\n  policy: auto\n  channel_capacity: 2$", text, re.MULTILINE)
