"""The outer form of a `lightvo/1` message: topic, header, arrays. What a topic carries is vo/messages.py's matter.

    topic | 0x00 | header length (4 bytes, little-endian) | header (a MessagePack map) | zeros | arrays

Zeros fill up to a multiple of 8 before the arrays and between them; the header lists the arrays in order with their
dtype, shape and offset. Everything read is checked against a limit before anything is allocated for it, and whatever
is wrong with the bytes of others is a ProtocolError.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar, cast

import msgpack
import numpy as np
from numpy.typing import NDArray

from vo.types import VoError

SCHEMA = "lightvo/1"

MAX_TOPIC_BYTES = 16
MAX_HEADER_BYTES = 16 * 1024
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_ENTRIES = 64
MAX_DIMENSIONS = 4
MAX_TEXT_LENGTH = 256
MAX_INTEGER = 2**63 - 1
ALIGNMENT_BYTES = 8

_LENGTH_BYTES = 4
_DTYPES = {name: np.dtype(name) for name in ("<f8", "<f4", "<i8", "<i4", "|u1")}

EnumType = TypeVar("EnumType", bound=Enum)


class ProtocolError(VoError):
    """Bytes that are no message of this protocol; says in one line what is wrong with them."""


class VersionError(ProtocolError):
    """A message of another major version of the protocol."""


class Fields:
    """Reads the values of a header; each method raises ProtocolError naming the key that is not as it must be."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
            raise ProtocolError(f"{key}: expected a text of at most {MAX_TEXT_LENGTH} characters, got {shown(value)}")
        return value

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self._take(key)
        if type(value) is not int or not minimum <= value <= MAX_INTEGER:
            raise ProtocolError(f"{key}: expected an integer in {minimum}..{MAX_INTEGER}, got {shown(value)}")
        return value

    def optional_integer(self, key: str, minimum: int = 0) -> int | None:
        return None if self._take(key) is None else self.integer(key, minimum)

    def added_integer(self, key: str, default: int) -> int:
        """A key that was added within this version: older publishers leave it out."""
        return self.integer(key) if key in self._values else default

    def added_flag(self, key: str) -> bool:
        """A flag that was added within this version: older publishers leave it out, and mean false."""
        return self.flag(key) if key in self._values else False

    def added_mapping(self, key: str) -> Mapping[str, object] | None:
        """A map that was added within this version, None where it is nil or left out."""
        return self.mapping(key) if self._values.get(key) is not None else None

    def number(self, key: str) -> float:
        value = self._take(key)
        if type(value) not in (int, float) or not math.isfinite(cast(float, value)):
            raise ProtocolError(f"{key}: expected a finite number, got {shown(value)}")
        return float(cast(float, value))

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if not isinstance(value, bool):
            raise ProtocolError(f"{key}: expected true or false, got {shown(value)}")
        return value

    def choice(self, key: str, options: type[EnumType]) -> EnumType:
        value = self._take(key)
        option: EnumType | None = _options(options).get(value) if isinstance(value, str) else None
        if option is None:
            raise ProtocolError(f"{key}: expected {', '.join(o.value for o in options)}, got {shown(value)}")
        return option

    def optional_choice(self, key: str, options: type[EnumType]) -> EnumType | None:
        return None if self._take(key) is None else self.choice(key, options)

    def mapping(self, key: str) -> Mapping[str, object]:
        value = self._take(key)
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ProtocolError(f"{key}: expected a map with text keys, got {shown(value)}")
        return value

    def _take(self, key: str) -> object:
        if key not in self._values:
            raise ProtocolError(f"{key}: missing from the header")
        return self._values[key]


@functools.cache
def _options(options: type[EnumType]) -> dict[str, EnumType]:
    return {option.value: option for option in options}


class Arrays:
    """The arrays of a message: read-only views into its bytes."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def take(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """The array `name`; None in `shape` stands for any length. Raises ProtocolError unless it is there and fits."""
        if name not in self._arrays:
            raise ProtocolError(f"arrays: {name}: missing")
        array = self._arrays[name]
        fits = array.shape == shape or (
            array.ndim == len(shape)
            and all(want is None or have == want for have, want in zip(array.shape, shape, strict=True))
        )
        if not fits or array.dtype != _DTYPES[dtype]:
            expected = tuple("*" if length is None else length for length in shape)
            raise ProtocolError(f"arrays: {name}: expected {expected} {dtype}, got {array.shape} {array.dtype.str}")
        return array


def pack(topic: str, fields: Mapping[str, object], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of a message. Raises ValueError where it is larger than the protocol allows."""
    layout, payload_bytes = _layout(arrays)
    header = cast(bytes, msgpack.packb({"schema": SCHEMA, **fields, "arrays": layout}))
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(header)} bytes is above {MAX_HEADER_BYTES}")
    start = topic.encode() + b"\0" + len(header).to_bytes(_LENGTH_BYTES, "little") + header
    num_bytes = _aligned(len(start)) + payload_bytes
    if num_bytes > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {num_bytes} bytes is above {MAX_MESSAGE_BYTES}")
    return b"".join([_padded(start), *(_padded(array.tobytes()) for array in arrays.values())])[:num_bytes]


def unpack(data: bytes | memoryview) -> tuple[str, Fields, Arrays]:
    """Topic, header and arrays of a message. Raises VersionError for another version, ProtocolError otherwise."""
    view = memoryview(data).cast("B").toreadonly()
    if view.nbytes > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {view.nbytes} bytes is above {MAX_MESSAGE_BYTES}")
    start = bytes(view[: MAX_TOPIC_BYTES + 1])
    topic, separator, _ = start.partition(b"\0")
    if not separator or not topic.isalnum() or not topic.isascii():
        raise ProtocolError(f"no topic in the first {MAX_TOPIC_BYTES + 1} bytes: {shown(start)}")
    header_start = len(topic) + 1 + _LENGTH_BYTES
    header_bytes = int.from_bytes(view[len(topic) + 1 : header_start], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {header_bytes} bytes is above {MAX_HEADER_BYTES}")
    header_end = header_start + header_bytes
    if _aligned(header_end) > view.nbytes:
        raise ProtocolError(f"message of {view.nbytes} bytes ends before its header, at {_aligned(header_end)}")
    fields = unpack_fields(view[header_start:header_end])
    return topic.decode(), fields, _unpack_arrays(view[_aligned(header_end) :], fields.mapping("arrays"))


def pack_fields(fields: Mapping[str, object]) -> bytes:
    """A header alone: the form of a request."""
    return cast(bytes, msgpack.packb({"schema": SCHEMA, **fields}))


def unpack_fields(data: bytes | memoryview) -> Fields:
    """A header of this version. Raises VersionError for another version, ProtocolError otherwise."""
    try:
        values = msgpack.unpackb(
            data,
            use_list=False,
            strict_map_key=True,
            object_pairs_hook=_unique,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
        )
    except ValueError as error:
        raise ProtocolError(f"header is not MessagePack within the limits: {shown(error)}") from error
    if not isinstance(values, dict):
        raise ProtocolError(f"header is not a map: {shown(values)}")
    schema = values.get("schema")
    if schema != SCHEMA and isinstance(schema, str) and schema.startswith("lightvo/"):
        raise VersionError(f"the message speaks {shown(schema)}, this program {SCHEMA}: bring both to one version")
    if schema != SCHEMA:
        raise ProtocolError(f"schema: expected {SCHEMA}, got {shown(schema)}")
    return Fields(values)


def shown(value: object) -> str:
    """Something of others for an error message of ours: one short line."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")


def _layout(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Where each array lies behind the header (dtype, shape, offset), and where the last one ends."""
    layout, end = {}, 0
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES:
            raise ValueError(f"{name}: dtype {array.dtype.str} is none of {', '.join(sorted(_DTYPES))}")
        offset = _aligned(end)
        layout[name] = (array.dtype.str, array.shape, offset)
        end = offset + array.nbytes
    return layout, end


def _unique(pairs: list[tuple[object, object]]) -> dict[object, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ProtocolError("a key comes twice in a map of the header")
    return values


def _unpack_arrays(payload: memoryview, layout: Mapping[str, object]) -> Arrays:
    """The arrays behind the header, which must fill it without a gap or a rest."""
    arrays: dict[str, NDArray[Any]] = {}
    end, num_bytes = 0, payload.nbytes
    for name, entry in layout.items():
        dtype, shape, offset, size_bytes = _checked_entry(name, entry)
        if offset != _aligned(end):
            raise ProtocolError(f"arrays: {shown(name)}: expected offset {_aligned(end)}, got {shown(offset)}")
        end = offset + size_bytes
        if end > num_bytes:
            raise ProtocolError(f"arrays: {shown(name)} ends at {end} of {num_bytes} bytes")
        arrays[name] = np.ndarray(shape, dtype, payload, offset)
    if end != num_bytes:
        raise ProtocolError(f"{num_bytes - end} bytes behind the last array")
    return Arrays(arrays)


def _checked_entry(name: str, entry: object) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, offset and bytes of an array; also the shape of an empty one must be within the limits."""
    if not (isinstance(entry, tuple) and len(entry) == 3):
        raise ProtocolError(f"arrays: {shown(name)}: expected [dtype, shape, offset], got {shown(entry)}")
    dtype, shape, offset = entry
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError(f"arrays: {shown(name)}: unknown dtype {shown(dtype)}")
    if not (isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS):
        raise ProtocolError(f"arrays: {shown(name)}: bad shape {shown(shape)}")
    num_elements = num_at_least = 1
    for length in shape:  # plain loops: every array of every message comes through here
        if type(length) is not int or length < 0:
            raise ProtocolError(f"arrays: {shown(name)}: bad shape {shown(shape)}")
        num_elements *= length
        num_at_least *= length or 1
    if num_at_least > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"arrays: {shown(name)}: shape {shown(shape)} is above {MAX_MESSAGE_BYTES} bytes")
    if type(offset) is not int:
        raise ProtocolError(f"arrays: {shown(name)}: bad offset {shown(offset)}")
    return _DTYPES[dtype], shape, offset, num_elements * _DTYPES[dtype].itemsize
