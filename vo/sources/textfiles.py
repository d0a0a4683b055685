"""Text and YAML files that came with the frames, read strictly: every fault names the file and the line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path

import yaml

from vo.types import SourceError

_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?\Z")
_OPENCV_HEADER = re.compile(r"\A%YAML:1\.\d[ \t]*\r?$", re.MULTILINE)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but `1e-3` is a number, a repeated key is a fault, and OpenCV's matrix tag is a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        mapping: dict[Hashable, object] = super().construct_mapping(node, deep)
        return mapping


def _construct_matrix(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    matrix: dict[Hashable, object] = loader.construct_mapping(node, deep=True)
    return matrix


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_StrictLoader.add_constructor("tag:yaml.org,2002:opencv-matrix", _construct_matrix)


def read_text(path: Path, remedy: str) -> str:
    """The text of a file; raises SourceError with the remedy where it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SourceError(f"{path}: not found; {remedy}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not a text file; {remedy}") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; {remedy}") from None


def data_lines(text: str) -> list[tuple[int, str]]:
    """(line number from 1, content without blanks at its ends) of every line that is neither empty nor a # comment."""
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def read_yaml(path: Path, remedy: str) -> Mapping[str, object]:
    """The mapping a YAML file holds; an OpenCV header (`%YAML:1.0`) is passed over."""
    text = _OPENCV_HEADER.sub("", read_text(path, remedy), count=1)
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SourceError(f"{path}:{line}: not valid YAML: {error.problem}; {remedy}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date or a number, and is none
        raise SourceError(f"{path}: not valid YAML: {str(error).splitlines()[0]}; {remedy}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SourceError(f"{path}: expected a mapping of names to values; {remedy}")
    return content


def number_field(fields: Mapping[str, object], name: str, where: str) -> float:
    """A finite number, or SourceError naming file and field."""
    if name not in fields:
        raise SourceError(f"{where}: {name}: missing")
    return _number(fields[name], f"{where}: {name}")


def numbers_field(fields: Mapping[str, object], name: str, where: str) -> tuple[float, ...]:
    """A list of finite numbers, or SourceError naming file and field."""
    if name not in fields:
        raise SourceError(f"{where}: {name}: missing")
    values = fields[name]
    if not isinstance(values, list):
        raise SourceError(f"{where}: {name}: expected a list of numbers, got {values!r}")
    return tuple(_number(value, f"{where}: {name}[{position}]") for position, value in enumerate(values))


def text_field(fields: Mapping[str, object], name: str, where: str) -> str:
    """A text that is not empty, or SourceError naming file and field."""
    if name not in fields:
        raise SourceError(f"{where}: {name}: missing")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"{where}: {name}: expected text, got {value!r}")
    return value


def only_fields(fields: Mapping[str, object], valid: tuple[str, ...], where: str) -> None:
    """Raise SourceError naming the first field that is not valid here."""
    for name in fields:
        if name not in valid:
            raise SourceError(f"{where}: {name}: unknown field; valid: {', '.join(valid)}")


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(f"{where}: expected a number, got {value!r}")
    if not abs(value) < 1e300:
        raise SourceError(f"{where}: expected a finite number, got {value!r}")
    return float(value)
