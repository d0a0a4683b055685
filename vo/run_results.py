"""The results of a run while it goes on: its output directory, and what its evaluation will need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from vo.output import OutputError
from vo.plots import load_ahead
from vo.recorder import Recorder
from vo.refined import RefinedFile
from vo.run_report import PoseLog
from vo.stages import FrameResult
from vo.types import MapUpdate

# Poses after which what the plot will need is loaded, so that nobody waits for that at the end of the run.
_PLOTS_AFTER = 10


class RunResults:
    """Records every frame. A context manager: leaving it closes the files.

    A disk that refuses ends the run of a file, which exists for its results; poses of a camera are for whoever
    listens, so there the run goes on without writing: `failure` says that it happened, and `say` is told once.
    """

    def __init__(
        self, output_dir: Path | None, *, outlives_disk: bool, is_evaluated: bool, say: Callable[[str], None]
    ) -> None:
        """Makes the directory, None: nothing is written. Raises OutputError where that is not possible."""
        self.recorder = None if output_dir is None else Recorder(output_dir)
        self._refined = None if output_dir is None else RefinedFile(output_dir)
        self.poses = PoseLog(is_wanted=is_evaluated)
        self.failure: OutputError | None = None
        self._outlives_disk = outlives_disk
        self._say = say
        self._plots: threading.Thread | None = None

    def add(self, result: FrameResult) -> None:
        """A frame, after it was published. Raises OutputError."""
        self.poses.add(result.step.pose)
        self._write(lambda: self._record(result))

    def correct(self, update: MapUpdate) -> None:
        """What the window still corrected after the last frame."""
        if self._refined is not None:
            self._refined.correct(update)

    def finish(self, report: Callable[[], None]) -> None:
        """Completes what only the end of the run can complete, then reports, whatever has happened before.

        Raises OutputError, unless the disk had refused already: the first refusal is the one to tell.
        """
        try:
            if self._refined is not None:
                self._write(self._refined.finish)
            self._await_plots()
        finally:
            try:
                report()
            except OutputError:
                if self.failure is None:
                    raise

    def _record(self, result: FrameResult) -> None:
        if self.recorder is None or self._refined is None:
            return
        self.recorder.record(result.step.pose)
        if self._plots is None and self.recorder.num_poses == _PLOTS_AFTER:
            self._plots = load_ahead()
        if result.step.map_update is not None:
            self._refined.correct(result.step.map_update)
        self._refined.add(result.step.pose)

    def _await_plots(self) -> None:
        if self._plots is not None:
            self._plots.join()

    def _write(self, write: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            write()
        except OutputError as error:
            self.failure = error
            if not self._outlives_disk:
                raise
            self._say(f"the results end here, the run goes on: {error}")

    def __enter__(self) -> RunResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as closing:
            closing.callback(self._await_plots)
            if self.recorder is not None:
                closing.callback(self.recorder.close)
            if self._refined is not None:
                closing.callback(self._refined.close)
