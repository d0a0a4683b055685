"""The files a run writes at the user's wish, besides the results of its output directory: a recording, the tracks."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vo.message_stream import MessageStream
from vo.output import OutputError, prepare_directory, writing
from vo.sources.cameras import write_camera
from vo.stages import FrameResult
from vo.tracks_archive import TracksArchive
from vo.types import Camera, ConfigError

if TYPE_CHECKING:  # needs packages that a run without a recording can do without
    from vo.mcap_recorder import McapRecorder

TRACKS_DIRECTORY = "tracks"
CAMERA_NAME = "camera.yaml"


@dataclass(frozen=True, slots=True)
class WantedFiles:
    """What the user asked for.

    record            file of the recording, None: none.
    tracks_directory  where the tracks go, None: nowhere.
    keyframe_quality  JPEG quality of keyframes in the recording, 0: none.
    """

    record: Path | None = None
    tracks_directory: Path | None = None
    keyframe_quality: int = 90


class RunFiles:
    """Writes them while the run goes on. A context manager: leaving it completes the files.

    The disk refusing a recording does not end the run: `failure` says that it happened.
    """

    def __init__(self, wanted: WantedFiles, source: str, *, is_quiet: bool = False) -> None:
        """Makes the files. Raises OutputError where that is not possible."""
        self._is_quiet = is_quiet
        self._resources = ExitStack()
        self._recorder: McapRecorder | None = None
        self._tracks: TracksArchive | None = None
        with ExitStack() as opened:
            if wanted.tracks_directory is not None:
                self._tracks = opened.enter_context(TracksArchive(wanted.tracks_directory))
            if wanted.record is not None:
                from vo.mcap_recorder import McapRecorder

                self._recorder = opened.enter_context(
                    McapRecorder(
                        wanted.record, source, keyframe_quality=wanted.keyframe_quality, on_failure=_say_that_it_ended
                    )
                )
            self._resources = opened.pop_all()

    def follow(self, stream: MessageStream) -> None:
        """Records what the stream says from now on."""
        if self._recorder is not None:
            stream.add_consumer(self._recorder.add)

    def add(self, result: FrameResult) -> None:
        """What is written of a frame besides its messages; call it after they were published."""
        if self._tracks is not None:
            self._tracks.add(result.step.tracks)
        if self._recorder is not None and result.step.pose.is_keyframe:
            self._recorder.add_keyframe(result.captured.frame)

    @property
    def failure(self) -> OutputError | None:
        """Why the recording is not whole; None where it is, or where there is none."""
        return None if self._recorder is None else self._recorder.failure

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)
        recorder = self._recorder
        if recorder is not None and (recorder.num_recorded or recorder.failure) and not self._is_quiet:
            print(_recording_line(recorder), flush=True)


def write_run_camera(directory: Path, camera: Camera, comment: str = "") -> None:
    """camera.yaml: what the images of the run were taken with. Raises OutputError."""
    prepare_directory(directory)
    with writing(directory / CAMERA_NAME):
        write_camera(directory / CAMERA_NAME, camera, comment=comment or "Intrinsics of this run.")


def tracks_directory(output: Path | None) -> Path:
    """Where tracks go. Raises ConfigError without an output directory."""
    if output is None:
        raise ConfigError("--save-tracks: needs a place to write to; add --output DIR")
    return output / TRACKS_DIRECTORY


def _recording_line(recorder: McapRecorder) -> str:
    notes = [f"{recorder.num_recorded} messages, {recorder.num_bytes / 1e6:.1f} MB"]
    if recorder.num_lost:
        notes.append(f"{recorder.num_lost} lost: the disk was too slow")
    if recorder.failure is not None:
        notes[1:] = ["ended early: the disk refused to take more"]
    return f"recording   {recorder.path}: {'; '.join(notes)}"


def _say_that_it_ended(error: OutputError) -> None:
    print(f"vo: the recording ends here, the run goes on: {error}", file=sys.stderr, flush=True)
