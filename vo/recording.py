"""Recordings as MCAP files: written so that a kill costs the last second at most, and read however they ended.

The only module that imports `mcap`. What is recorded, and on which channels, is vo/mcap_recorder.py's matter;
docs/RECORDING.md describes the file.

A file that was closed ends with a summary. One whose run was killed ends anywhere, perhaps in the middle of a record:
it is read record by record, up to the last one that is whole. Both are read in the same way.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from vo.output import OutputError, writing
from vo.types import VoError

try:
    import zstandard
    from mcap.data_stream import ReadDataStream
    from mcap.exceptions import McapError
    from mcap.opcode import Opcode
    from mcap.records import Channel, Chunk, Message, Metadata, Schema
    from mcap.stream_reader import CRCValidationError, breakup_chunk
    from mcap.writer import MCAP0_MAGIC, CompressionType, Writer
except ImportError as error:
    raise OutputError(
        f"recordings need the package mcap ({error}); install it: pip install 'lightvo[record]'"
    ) from None

__all__ = ["ChannelSpec", "RecordedMessage", "Recording", "RecordingError", "RecordingWriter"]

CHUNK_BYTES = 1024 * 1024
MAX_PENDING_BYTES = 8 * 1024 * 1024
MAX_CHUNK_BYTES = 256 * 1024 * 1024
METADATA_NAME = "lightvo"

_RECORD_HEADER = struct.Struct("<BQ")
_CHUNK_HEADER = struct.Struct("<QQQ")
_KNOWN_OPCODES = frozenset(int(opcode) for opcode in Opcode)
_FIRST_PRIVATE_OPCODE = 0x80


class RecordingError(VoError):
    """A file that is no recording, or cannot be read: names it, and the remedy."""


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """A channel of a recording: its topic, how its messages are encoded, and the schema they follow, if any."""

    topic: str
    message_encoding: str
    schema_name: str = ""
    schema_encoding: str = ""
    schema: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedMessage:
    """One message of a recording; `time_ns` on the clock of the recording, `publish_ns` Unix time."""

    topic: str
    data: bytes
    time_ns: int
    publish_ns: int
    sequence: int


# --- writing ---


class _Output:
    """What the MCAP writer writes to: whole records only, and all of them or none between two commits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("xb", buffering=0)
        self._pending: list[bytes] = []
        self._num_pending_bytes = 0
        self.num_bytes = 0

    @property
    def num_pending_bytes(self) -> int:
        return self._num_pending_bytes

    def write(self, data: bytes) -> int:
        self._pending.append(data)
        self._num_pending_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes + self._num_pending_bytes

    def flush(self) -> None:
        """Nothing is done behind the back of `commit`."""

    def commit(self) -> None:
        """Hands over everything written since the last commit and waits until the disk has it."""
        data = memoryview(b"".join(self._pending))
        self._pending.clear()
        self._num_pending_bytes = 0
        num_bytes = len(data)
        with writing(self._path):
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):  # the error that led here is the one to report
                    self._file.truncate(self.num_bytes)
                raise
        self.num_bytes += num_bytes

    def close(self) -> None:
        self._file.close()


class RecordingWriter:
    """An MCAP file that grows by whole commits. Not thread-safe.

    Every method raises OutputError, in one line with the path, where the disk refuses; what was committed before
    stays readable, and nothing half written stays behind it.
    """

    def __init__(self, path: Path, channels: Sequence[ChannelSpec]) -> None:
        """Makes the file, which must not exist: a recording is never written over."""
        if path.exists():
            raise OutputError(f"{path}: exists already, and a recording is not written over; give another name")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._output = _Output(path)
        # Foxglove asks for an index; the checksums tell a torn chunk from a whole one after a power failure.
        self._writer = Writer(cast(IO[bytes], self._output), CHUNK_BYTES, CompressionType.ZSTD)
        self._writer.start(profile="", library="lightvo")
        self._channel_ids = {channel.topic: self._register(channel) for channel in channels}
        try:
            self._output.commit()
        except OutputError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    @property
    def num_bytes(self) -> int:
        """What is on the disk."""
        return self._output.num_bytes

    def add(self, topic: str, data: bytes, time_ns: int, publish_ns: int, sequence: int = 0) -> None:
        """Appends a message to the channel of `topic`. It is safe with the next commit."""
        self._writer.add_message(self._channel_ids[topic], time_ns, data, publish_ns, sequence)
        if self._output.num_pending_bytes > MAX_PENDING_BYTES:
            self._output.commit()

    def add_metadata(self, values: Mapping[str, str]) -> None:
        """Says something about the whole recording."""
        self._writer.add_metadata(METADATA_NAME, dict(values))

    def commit(self) -> None:
        """Everything added so far survives whatever comes."""
        self._writer.flush()
        self._output.commit()

    def finish(self) -> None:
        """Commits and writes the summary with the index; the file is complete."""
        self._writer.finish()
        self._output.commit()

    def close(self) -> None:
        """Closes the file as it is; safe to call twice."""
        self._output.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _register(self, channel: ChannelSpec) -> int:
        schema_id = 0
        if channel.schema_name:
            schema_id = self._writer.register_schema(channel.schema_name, channel.schema_encoding, channel.schema)
        return self._writer.register_channel(channel.topic, channel.message_encoding, schema_id)


# --- reading ---


@dataclass(frozen=True, slots=True)
class _ChunkEntry:
    """Where a chunk's content begins, its length in the file, and the times of its first and last message."""

    offset: int
    num_bytes: int
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class _Contents:
    """What a walk over the records of a file found, without looking into the chunks."""

    chunks: list[_ChunkEntry] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    end: int = 0
    is_complete: bool = False


class Recording:
    """A recording to read from, whole or cut short.

    is_complete      the file was closed by its run; otherwise it is read up to its last whole record.
    num_lost_bytes   behind that record.
    metadata         what the recording says about itself.
    start_ns, end_ns of its messages, on the clock of the recording; 0 without any.
    damages          chunks that could not be read, found so far, one line each.
    """

    def __init__(self, path: Path) -> None:
        """Raises RecordingError where the file cannot be read or is no recording."""
        self.path = path
        self.damages: list[str] = []
        try:
            with path.open("rb") as file:
                contents = _walk(file, path)
                while contents.chunks and not contents.is_complete and _records(file, contents.chunks[-1]) is None:
                    contents.end = contents.chunks.pop().offset - _RECORD_HEADER.size
                self.num_lost_bytes = 0 if contents.is_complete else os.fstat(file.fileno()).st_size - contents.end
        except OSError as error:
            raise RecordingError(f"{path}: cannot read: {error.strerror or error}") from error
        self.is_complete = contents.is_complete
        self.metadata: Mapping[str, str] = contents.metadata
        self._chunks = contents.chunks
        self.start_ns = min((chunk.start_ns for chunk in self._chunks), default=0)
        self.end_ns = max((chunk.end_ns for chunk in self._chunks), default=0)

    @property
    def channel_specs(self) -> tuple[ChannelSpec, ...]:
        """The channels with their schemas, as the first chunk lists them."""
        with self.path.open("rb") as file:
            records = (_records(file, self._chunks[0]) or ()) if self._chunks else ()
        schemas = {record.id: record for record in records if isinstance(record, Schema)}
        specs = []
        for channel in records:
            if isinstance(channel, Channel):
                schema = schemas.get(channel.schema_id, Schema(0, b"", "", ""))
                specs.append(
                    ChannelSpec(channel.topic, channel.message_encoding, schema.name, schema.encoding, schema.data)
                )
        return tuple(specs)

    def messages(
        self, topics: Sequence[str] | None = None, start_ns: int | None = None, end_ns: int | None = None
    ) -> Iterator[RecordedMessage]:
        """Messages of `topics` (all) from `start_ns` to `end_ns`, both included, in the order they were recorded.

        Chunks outside the interval are not read. A damaged chunk is left out and noted in `damages`.
        """
        channels: dict[int, Channel] = {}
        with self.path.open("rb") as file:
            for chunk in self._chunks:
                # The first chunk declares the channels.
                if channels and not _overlaps(chunk.start_ns, chunk.end_ns, start_ns, end_ns):
                    continue
                records = _records(file, chunk)
                if records is None:
                    self.damages.append(f"{self.path}: the chunk at byte {chunk.offset} is damaged and left out")
                    continue
                channels |= {record.id: record for record in records if isinstance(record, Channel)}
                for record in records:
                    if not isinstance(record, Message) or record.channel_id not in channels:
                        continue
                    topic = channels[record.channel_id].topic
                    is_wanted = topics is None or topic in topics
                    if is_wanted and _overlaps(record.log_time, record.log_time, start_ns, end_ns):
                        yield RecordedMessage(topic, record.data, record.log_time, record.publish_time, record.sequence)


def _overlaps(first_ns: int, last_ns: int, start_ns: int | None, end_ns: int | None) -> bool:
    """Whether the times `first_ns` to `last_ns` reach into the interval, both ends included; None: no bound."""
    return (start_ns is None or last_ns >= start_ns) and (end_ns is None or first_ns <= end_ns)


def _walk(file: IO[bytes], path: Path) -> _Contents:
    """Goes from record to record until the footer, or the first one that is not whole."""
    num_bytes = os.fstat(file.fileno()).st_size
    if file.read(len(MCAP0_MAGIC)) != MCAP0_MAGIC:
        raise RecordingError(f"{path}: is no MCAP file; give one that vo run --record has written")
    contents = _Contents(end=len(MCAP0_MAGIC))
    while True:
        head = file.read(_RECORD_HEADER.size)
        if len(head) < _RECORD_HEADER.size:
            return contents
        opcode, length = _RECORD_HEADER.unpack(head)
        start, end = file.tell(), file.tell() + length
        if (opcode not in _KNOWN_OPCODES and opcode < _FIRST_PRIVATE_OPCODE) or end > num_bytes:
            return contents
        if opcode == Opcode.CHUNK:
            start_ns, end_ns, num_uncompressed = _CHUNK_HEADER.unpack(file.read(_CHUNK_HEADER.size))
            if max(length, num_uncompressed) > MAX_CHUNK_BYTES:
                raise RecordingError(f"{path}: the chunk at byte {start} is larger than {MAX_CHUNK_BYTES} bytes")
            contents.chunks.append(_ChunkEntry(start, length, start_ns, end_ns))
        elif opcode == Opcode.METADATA:
            metadata = Metadata.read(ReadDataStream(file))
            if metadata.name == METADATA_NAME:
                contents.metadata |= metadata.metadata
        contents.end = end
        if opcode == Opcode.FOOTER:
            file.seek(end)
            contents.is_complete = file.read(len(MCAP0_MAGIC)) == MCAP0_MAGIC
            return contents
        file.seek(end)


def _records(file: IO[bytes], entry: _ChunkEntry) -> Sequence[object] | None:
    """The records in a chunk; None where it is damaged."""
    file.seek(entry.offset)
    try:
        return breakup_chunk(Chunk.read(ReadDataStream(file)), validate_crc=True)
    except (McapError, CRCValidationError, zstandard.ZstdError, struct.error, UnicodeDecodeError):
        return None
