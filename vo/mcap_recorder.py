"""Records the messages of a run into an MCAP file, in a thread of its own, so that the disk never delays a pose.

Two kinds of channels: `lightvo/TOPIC` holds the very bytes of `lightvo/1` (`vo replay` sends them again), and the
others hold the same for Foxglove (vo/foxglove.py). docs/RECORDING.md describes both.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2

from vo import __version__, foxglove
from vo.camera_models import scaled_camera, scaled_keypoints
from vo.foxglove import KEYFRAME_TOPIC
from vo.message_stream import EncodedMessage
from vo.messages import (
    PUBLISHED_TOPICS,
    SCHEMA,
    Body,
    CompressedImage,
    KeyframeUpdate,
    PointsUpdate,
    Topic,
    decode,
)
from vo.output import OutputError
from vo.recording import ChannelSpec, RecordingWriter
from vo.types import Camera, Frame, FrameTracks, PoseEstimate

MAX_QUEUE_BYTES = 64 * 1024 * 1024
COMMIT_PERIOD_S = 0.5
CLOSE_TIMEOUT_S = 60.0
MAX_SEQUENCE = 0xFFFF_FFFF
MAX_WAITING = 1000
# Sensor clocks that count from the start of the machine or of the file lie far below, Unix time far above.
EARLIEST_UNIX_NS = 946_684_800 * 1_000_000_000


_DRAWN_TOPICS = frozenset({Topic.POSE, Topic.KEYFRAME, Topic.POINTS, Topic.IMAGE, Topic.CAMERA})


def own_topic(topic: Topic) -> str:
    """The channel that holds the messages of a topic as they were published."""
    return f"lightvo/{topic.value}"


_OWN_TOPICS = frozenset(own_topic(topic) for topic in PUBLISHED_TOPICS)


class McapRecorder:
    """A consumer of a `MessageStream`: hand `add` to its `add_consumer`.

    A disk that cannot keep up costs images first, then everything else, once `max_queue_bytes` wait: what is lost is
    counted. A disk that refuses ends the recording, not the run: `failure` says why, and `on_failure` is told at once,
    in the thread of the recorder. What was recorded until then stays readable.

    num_recorded  messages of `lightvo/1` that are safe on the disk.
    num_lost      messages that a slow or refusing disk has cost.
    """

    def __init__(
        self,
        path: Path,
        source: str = "",
        *,
        keyframe_quality: int = 90,
        on_failure: Callable[[OutputError], None] | None = None,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        """Makes the file. Raises OutputError where that is not possible, or where it exists already.

        source            where the frames come from, for the reader of the file.
        keyframe_quality  JPEG quality of the images of keyframes, 0: none.
        """
        own = tuple(ChannelSpec(own_topic(topic), SCHEMA) for topic in PUBLISHED_TOPICS)
        self._writer = RecordingWriter(path, (*own, *foxglove.channels()))
        self._source, self._on_failure, self._max_queue_bytes = source, on_failure, max_queue_bytes
        self._keyframe_quality = keyframe_quality
        self.path = path
        self.num_recorded = 0
        self.num_lost = 0
        self.failure: OutputError | None = None
        self._queue: deque[EncodedMessage | Frame] = deque()
        self._num_queue_bytes = 0
        self._num_uncommitted = 0
        self._changed = threading.Condition()
        self._is_closing = self._is_finished = self._has_metadata = False
        self._converter = _Converter()
        self._thread = threading.Thread(target=self._work, name="mcap recorder", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._writer.num_bytes

    def add(self, message: EncodedMessage) -> None:
        """Takes a message to record; never waits."""
        self._put(message, is_image=message.topic is Topic.IMAGE)

    def add_keyframe(self, frame: Frame) -> None:
        """Takes the image of a keyframe, after its pose, to record it in full; never waits."""
        if self._keyframe_quality:
            self._put(frame, is_image=True)

    def _put(self, item: EncodedMessage | Frame, is_image: bool) -> None:
        num_bytes = _num_bytes(item)
        with self._changed:
            limit = self._max_queue_bytes // (2 if is_image else 1)
            is_full = bool(self._queue) and self._num_queue_bytes + num_bytes > limit
            if self.failure or self._is_closing or is_full:
                self.num_lost += 1
                return
            self._queue.append(item)
            self._num_queue_bytes += num_bytes
            self._changed.notify()

    def close(self) -> None:
        """Records what waits, completes the file and closes it; safe to call twice. A failure is left in `failure`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._fail(OutputError(f"{self.path}: the disk did not take the rest within {CLOSE_TIMEOUT_S:g} s"))
        elif not self._is_finished:
            raise RuntimeError(f"{self.path}: the recorder ended early")

    def __enter__(self) -> McapRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """The thread."""
        with self._writer:
            try:
                while self._record_next():
                    pass
                self._writer.finish()
            except OutputError as error:
                self._fail(error)
        if self._converter.clock_shift_ns is None:
            # A run that ended before its first frame leaves nothing that would be in the way of the next one.
            self.path.unlink(missing_ok=True)
        self._is_finished = True

    def _record_next(self) -> bool:
        """Records what comes in one period and commits it; False when nothing can follow."""
        end_s = time.monotonic() + COMMIT_PERIOD_S
        while (left_s := end_s - time.monotonic()) > 0:
            with self._changed:
                if not self._queue and not self._is_closing:
                    self._changed.wait(left_s)
                if not self._queue:
                    if self._is_closing:
                        break
                    continue
                item = self._queue.popleft()
                self._num_queue_bytes -= _num_bytes(item)
            self._record(item)
        with self._changed:
            is_over = self._is_closing and not self._queue
        self._writer.commit()
        self.num_recorded += self._num_uncommitted
        self._num_uncommitted = 0
        return not is_over

    def _record(self, item: EncodedMessage | Frame) -> None:
        if isinstance(item, Frame):
            entries = self._converter.convert_keyframe(item, self._keyframe_quality)
        else:
            entries = self._converter.convert(item)
        if entries and not self._has_metadata:
            self._writer.add_metadata(
                {
                    "schema": SCHEMA,
                    "session": self._converter.session_id,
                    "source": self._source,
                    "lightvo": __version__,
                    "clock_shift_ns": str(self._converter.clock_shift_ns),
                }
            )
            self._has_metadata = True
        for entry in entries:
            self._writer.add(entry.topic, entry.data, entry.time_ns, entry.publish_ns, entry.sequence & MAX_SEQUENCE)
            self._num_uncommitted += entry.topic in _OWN_TOPICS

    def _fail(self, error: OutputError) -> None:
        with self._changed:
            self.failure = error
            self.num_lost += len(self._queue) + self._num_uncommitted
            self._queue.clear()
            self._num_queue_bytes = 0
        if self._on_failure is not None:
            self._on_failure(error)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A message of the file, on its way there."""

    topic: str
    data: bytes
    time_ns: int
    publish_ns: int
    sequence: int


class _Converter:
    """Puts messages on the clock of the recording and adds those for Foxglove.

    clock_shift_ns  from the sensor's clock to that of the recording; None until the first frame says what it is. It is
                    zero where the sensor's clock is Unix time, and otherwise lets the first frame have the time at
                    which it was published. Messages before the first frame wait for it, the last 1000 of them.
    """

    def __init__(self) -> None:
        self.clock_shift_ns: int | None = None
        self.session_id = ""
        self._waiting: deque[EncodedMessage] = deque(maxlen=MAX_WAITING)
        self._camera: Camera | None = None
        self._tracks: EncodedMessage | None = None
        self._image_size: tuple[int, int] | None = None

    def convert(self, message: EncodedMessage) -> list[_Entry]:
        """What is to be written now that `message` has come: channel, bytes and time."""
        self._waiting.append(message)
        if self.clock_shift_ns is None:
            header = decode(message.data).header
            capture_ns = header.capture_time_ns
            if capture_ns is None:
                return []
            self.session_id = header.session_id
            self.clock_shift_ns = 0 if capture_ns >= EARLIEST_UNIX_NS else message.publish_ns - capture_ns
        return self._take(self._time_ns(message.capture_ns))

    def convert_keyframe(self, frame: Frame, quality: int) -> list[_Entry]:
        """The image of a keyframe as a JPEG of full size; its sequence number is the frame's index."""
        if self.clock_shift_ns is None:
            return []
        time_ns = self._time_ns(frame.timestamp_ns)
        jpeg = _jpeg(frame, quality)
        return [
            _Entry(KEYFRAME_TOPIC, part.data, time_ns, time.time_ns(), frame.index)
            for part in foxglove.from_jpeg(jpeg, time_ns, KEYFRAME_TOPIC)
        ]

    def _time_ns(self, capture_ns: int) -> int:
        """A time of the sensor's clock on that of the recording, which knows no time before 1970."""
        return max(0, capture_ns + (self.clock_shift_ns or 0))

    def _take(self, time_ns: int) -> list[_Entry]:
        entries: list[_Entry] = []
        for message in self._waiting:
            parts = [(own_topic(message.topic), message.data)]
            if message.topic is Topic.TRACKS:
                self._tracks = message
            if message.topic in _DRAWN_TOPICS:
                drawn = self._foxglove(decode(message.data).body, time_ns)
                parts += [(part.topic, part.data) for part in drawn]
            entries += [_Entry(topic, data, time_ns, message.publish_ns, message.sequence) for topic, data in parts]
        self._waiting.clear()
        return entries

    def _foxglove(self, body: Body, time_ns: int) -> tuple[foxglove.FoxgloveMessage, ...]:
        match body:
            case PoseEstimate():
                return foxglove.from_pose(body, time_ns)
            case KeyframeUpdate():
                return foxglove.from_keyframes(body.T_world_keyframes, body.segment_id, time_ns)
            case PointsUpdate() if len(body.landmark_ids):
                return foxglove.from_landmarks(body.landmarks, body.landmark_colors, body.segment_id, time_ns)
            case Camera():
                self._camera = body
                return self._calibration(time_ns)
            case CompressedImage():
                # Foxglove wants a calibration of the image's own size, and wants it before the image.
                is_new = self._image_size != (body.width, body.height)
                self._image_size = (body.width, body.height)
                image = (*foxglove.from_jpeg(body.data.tobytes(), time_ns), *self._tracks_on(body, time_ns))
                return (*self._calibration(time_ns), *image) if is_new else image
            case _:
                return ()

    def _tracks_on(self, image: CompressedImage, time_ns: int) -> tuple[foxglove.FoxgloveMessage, ...]:
        """The tracks of the image's frame, which came before it, where they are in the image."""
        tracks = None if self._tracks is None else decode(self._tracks.data).body
        if self._camera is None or not isinstance(tracks, FrameTracks) or tracks.frame_index != image.frame_index:
            return ()
        keypoints = scaled_keypoints(tracks.keypoints, self._camera, image.width, image.height)
        return foxglove.from_tracks(keypoints, tracks.has_landmark, time_ns)

    def _calibration(self, time_ns: int) -> tuple[foxglove.FoxgloveMessage, ...]:
        if self._camera is None:
            return ()
        width, height = self._image_size or (self._camera.width, self._camera.height)
        return foxglove.from_camera(scaled_camera(self._camera, width, height), time_ns)


def _jpeg(frame: Frame, quality: int) -> bytes:
    """The image as a JPEG file of any size: that of a message is limited, that of a recording is not."""
    image = frame.image if frame.image.ndim == 2 else cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
    is_done, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
    if not is_done:
        raise RuntimeError(f"frame {frame.index}: OpenCV cannot write a JPEG of {image.shape}")
    return bytes(data.tobytes())


def _num_bytes(item: EncodedMessage | Frame) -> int:
    return item.image.nbytes if isinstance(item, Frame) else len(item.data)
