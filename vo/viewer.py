"""The scene in Open3D: in a window, or drawn off-screen into pictures and a video. The only module that imports it.

Importing this module fails where Open3D or one of its libraries is missing; vo/view_command.py says so in one line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import open3d as o3d
from numpy.typing import NDArray
from open3d.visualization import gui, rendering

from vo.scene import BACKGROUND, Chunk, Layer, Scene
from vo.scene_panel import PANEL_WIDTH, Panel, Picture, TextLine, TrackPicture, compose
from vo.scene_view import FIELD_OF_VIEW_DEG, Eye, Gaze, ViewState, approach, follow_gaze, overview_gaze
from vo.types import FloatArray

TITLE = "lightvo"
LINE_WIDTHS = {Layer.TRAJECTORY: 4.0, Layer.KEYFRAMES: 1.5, Layer.CAMERA: 3.0, Layer.TRUTH: 2.5}
UPDATE_BUDGET_S = 0.006
PANEL_PERIOD_S = 0.04
OVERVIEW_PERIOD_S = 0.5
IDLE_S = 0.01
MAX_REST_S = 1.0

_GUI_KEYS: dict[int, str] = {
    int(key): name
    for key, name in (
        *((getattr(gui.KeyName, letter), letter) for letter in "TKLCGIFOSHQ"),
        (gui.KeyName.ESCAPE, "Q"),
        (gui.KeyName.PLUS, "+"),
        (gui.KeyName.EQUALS, "+"),
        (gui.KeyName.MINUS, "-"),
    )
}


class SceneGraph:
    """Keeps what Open3D draws equal to a scene: each call hands over the chunks that changed, within a time budget."""

    def __init__(self, target: rendering.Open3DScene, *, is_smooth: bool) -> None:
        """is_smooth: draws every pixel from several samples, which takes twice the time where there is no GPU."""
        self._target = target
        self._shown: dict[str, Layer] = {}
        self._generation = -1
        self._hidden: set[Layer] = set()
        self._poses: dict[Layer, FloatArray] = {}
        self._materials = {layer: _line_material(width) for layer, width in LINE_WIDTHS.items()}
        self._materials[Layer.LANDMARKS] = _point_material(ViewState().point_size)
        # Without post-processing a colour on the screen is the colour that was asked for.
        target.view.set_post_processing(False)
        # Nothing here has a shadow, and looking for some takes a fifth of the time.
        target.view.set_shadowing(False)
        if not is_smooth:
            target.view.set_sample_count(1)
        target.set_background([*(channel ** (1 / 2.2) for channel in BACKGROUND), 1.0])

    def update(self, scene: Scene, view: ViewState, budget_s: float = UPDATE_BUDGET_S) -> int:
        """Takes over what has changed, and goes on the next time where the budget does not suffice; chunks drawn."""
        end_s = time.perf_counter() + budget_s
        if scene.generation != self._generation:
            self.clear()
            self._generation = scene.generation
        self._resize_points(view.point_size)
        num_chunks = 0
        while (chunk := scene.next_change()) is not None:
            self._replace(chunk, view)
            num_chunks += 1
            if time.perf_counter() > end_s:
                break
        self._show(view)
        self._move(Layer.CAMERA, scene.T_world_camera)
        self._move(Layer.TRUTH, scene.T_world_truth)
        return num_chunks

    def clear(self) -> None:
        """Removes everything; must come before the engine ends, which does not do it by itself."""
        for name in self._shown:
            self._target.remove_geometry(name)
        self._shown.clear()
        self._poses.clear()

    def _replace(self, chunk: Chunk, view: ViewState) -> None:
        if self._shown.pop(chunk.name, None) is not None:
            self._target.remove_geometry(chunk.name)
        if chunk.is_empty:
            return
        self._target.add_geometry(chunk.name, _geometry(chunk), self._materials[chunk.layer], False)
        self._shown[chunk.name] = chunk.layer
        if chunk.layer in view.hidden:
            self._target.show_geometry(chunk.name, False)
        if chunk.layer in self._poses:
            self._target.set_geometry_transform(chunk.name, self._poses[chunk.layer])

    def _show(self, view: ViewState) -> None:
        changed = self._hidden ^ view.hidden
        self._hidden = set(view.hidden)
        for name, layer in self._shown.items() if changed else ():
            if layer in changed:
                self._target.show_geometry(name, layer not in view.hidden)

    def _move(self, layer: Layer, T: FloatArray | None) -> None:
        """Moves a layer as a whole."""
        if T is None or self._poses.get(layer) is T:
            return
        self._poses[layer] = T
        for name, its_layer in self._shown.items():
            if its_layer is layer:
                self._target.set_geometry_transform(name, T)

    def _resize_points(self, size: float) -> None:
        material = self._materials[Layer.LANDMARKS]
        if material.point_size == size:
            return
        material.point_size = size
        for name, layer in self._shown.items():
            if layer is Layer.LANDMARKS:
                self._target.modify_geometry_material(name, material)


class Director:
    """Moves the eye: behind the camera, or so far off that everything is in view; a free eye is left alone."""

    def __init__(self) -> None:
        self._gaze: Gaze | None = None
        self._goal: Gaze | None = None
        self._computed_s = -np.inf
        self._last_s = time.monotonic()

    def gaze(self, scene: Scene, view: ViewState, aspect: float, *, is_immediate: bool = False) -> tuple[Gaze, bool]:
        """Where to look now, and whether that is where it will stay while the scene does not change."""
        now_s = time.monotonic()
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        goal = self._next_goal(scene, view, aspect, now_s)
        self._gaze, is_settled = approach(None if is_immediate else self._gaze, goal, elapsed_s)
        return self._gaze, is_settled

    def _next_goal(self, scene: Scene, view: ViewState, aspect: float, now_s: float) -> Gaze:
        if view.eye is not Eye.OVERVIEW and scene.T_world_camera is not None:
            self._computed_s = -np.inf
            return follow_gaze(scene.T_world_camera, scene.depth)
        if self._goal is None or now_s - self._computed_s > OVERVIEW_PERIOD_S:
            self._goal, self._computed_s = overview_gaze(*scene.bounds(), aspect), now_s
        return self._goal


class OffscreenView:
    """Draws scene and panel into a picture; needs no display."""

    def __init__(self, width: int, height: int, *, is_smooth: bool = True) -> None:
        """The picture is (height, width); the panel takes PANEL_WIDTH of it unless the image and help are hidden."""
        self._size = width, height
        self._scene_width = max(1, width - PANEL_WIDTH)
        with quiet_engine():
            self._renderer = rendering.OffscreenRenderer(self._scene_width, height)
            self._graph = SceneGraph(self._renderer.scene, is_smooth=is_smooth)
            self._renderer.render_to_image()
        self._panel, self._director = Panel(), Director()

    def __enter__(self) -> OffscreenView:
        return self

    def __exit__(self, *_: object) -> None:
        # The engine aborts the process where a scene outlives its renderer: their references go in this order.
        self._graph.clear()
        del self._graph
        del self._renderer

    def update(self, scene: Scene, view: ViewState, budget_s: float = UPDATE_BUDGET_S) -> int:
        """Takes over what has changed, like `SceneGraph.update`."""
        return self._graph.update(scene, view, budget_s)

    def aim(self, scene: Scene, view: ViewState, *, is_immediate: bool = False) -> Gaze:
        """Moves the eye; says where it is."""
        width, height = self._scene_width, self._size[1]
        gaze, _ = self._director.gaze(scene, view, width / height, is_immediate=is_immediate)
        _look(self._renderer.scene.camera, gaze, width / height)
        return gaze

    def draw_panel(self, picture: TrackPicture, lines: list[TextLine], view: ViewState) -> Picture:
        """(height, PANEL_WIDTH, 3) RGB."""
        return self._panel.draw(picture, lines, view, self._size[1])

    def draw(self, scene: Scene, picture: TrackPicture, lines: list[TextLine], view: ViewState) -> Picture:
        """(height, width, 3) RGB of everything there is."""
        self.update(scene, view, budget_s=np.inf)
        self.aim(scene, view, is_immediate=True)
        return compose(self.draw_panel(picture, lines, view), self.render())

    def render(self) -> Picture:
        """(height, width of the scene, 3) RGB."""
        return np.array(self._renderer.render_to_image())


class WindowView:
    """The window. `step` is to be called all the time; it waits a little where there is nothing to do.

    view  what the user has chosen with keys and mouse.
    """

    def __init__(self, width: int, height: int, view: ViewState, *, is_smooth: bool = True) -> None:
        self.view = view
        with quiet_engine():
            self._app = gui.Application.instance
            self._app.initialize()
            self._window = self._app.create_window(TITLE, width, height)
            self._widget = gui.SceneWidget()
            self._widget.scene = rendering.Open3DScene(self._window.renderer)
            self._graph = SceneGraph(self._widget.scene, is_smooth=is_smooth)
            self._image = gui.ImageWidget(_image(np.zeros((8, 8, 3), np.uint8)))
            self._window.add_child(self._widget)
            self._window.add_child(self._image)
            self._window.set_on_layout(self._layout)
            self._window.set_on_key(self._press)
            self._window.set_on_close(self._close)
            self._widget.set_on_mouse(self._mouse)
            self._app.run_one_tick()
        self._panel, self._director = Panel(), Director()
        self._panel_size = (PANEL_WIDTH, height)
        self._panel_s = -np.inf
        self._panel_version: tuple[object, ...] = ()
        self._last_panel: Picture | None = None
        self._is_open = True
        self._may_close = False
        self._needs_redraw = True
        self._rested_s = -np.inf

    def step(
        self, scene: Scene, picture: TrackPicture, lines: Callable[[], list[TextLine]], version: tuple[object, ...]
    ) -> bool:
        """One round: takes over what has changed, draws, listens to the user; False once the user wants to quit.

        `lines` is asked when the panel is to be drawn anew: no more often than it can be read, and only where
        `version` or the view is another than the last time.
        """
        has_changed = self._graph.update(scene, self.view) > 0
        has_moved = not self._aim(scene)
        self._needs_redraw |= self._draw_panel(picture, lines, version) or has_changed or has_moved
        self._tick()
        return self._is_open and not self.view.wants_quit

    def _tick(self) -> None:
        """Draws and hears the user.

        Where drawing is slow, for want of a GPU, it takes at most half of the time: the run needs the processor too.
        """
        start_s = time.monotonic()
        is_drawing = self._needs_redraw and start_s >= self._rested_s
        if is_drawing:
            self._window.post_redraw()
            self._needs_redraw = False
        self._is_open = bool(self._app.run_one_tick())
        if is_drawing:
            end_s = time.monotonic()
            self._rested_s = end_s + min(end_s - start_s - IDLE_S, MAX_REST_S)

    def picture(self) -> Picture:
        """(H, W, 3) RGB of what the window shows: drawn once more, for the screen cannot be read everywhere."""
        taken: list[Picture] = []
        self._widget.scene.scene.render_to_image(lambda image: taken.append(np.array(image)))
        while not taken and self._is_open:
            self._window.post_redraw()
            self._is_open = bool(self._app.run_one_tick())
        scene = taken[0] if taken else np.zeros((8, 8, 3), np.uint8)
        panel = self._last_panel
        if panel is None or not taken:
            return scene
        height = min(len(panel), len(scene))
        return compose(panel[:height], scene[:height])

    def close(self) -> None:
        """Closes the window and lets go of the engine; safe to call twice."""
        if not self._is_open:
            return
        self._graph.clear()
        self._may_close = True
        self._window.close()
        while self._is_open:
            self._is_open = bool(self._app.run_one_tick())

    def _aim(self, scene: Scene) -> bool:
        """Moves the eye; whether it has come to rest."""
        if self.view.eye is Eye.FREE:
            return True
        frame = self._widget.frame
        aspect = frame.width / max(1, frame.height)
        gaze, is_settled = self._director.gaze(scene, self.view, aspect)
        _look(self._widget.scene.camera, gaze, aspect)
        self._widget.center_of_rotation = gaze.target.astype(np.float32)
        return is_settled

    def _draw_panel(
        self, picture: TrackPicture, lines: Callable[[], list[TextLine]], version: tuple[object, ...]
    ) -> bool:
        view = self.view
        version = (
            *version,
            self._panel_size,
            view.point_size,
            view.eye,
            frozenset(view.hidden),
            view.shows_image,
            view.shows_help,
        )
        now_s = time.monotonic()
        if version == self._panel_version or now_s - self._panel_s < PANEL_PERIOD_S:
            return False
        self._panel_version, self._panel_s = version, now_s
        scale = self._panel_size[0] / PANEL_WIDTH
        self._last_panel = self._panel.draw(picture, lines(), view, self._panel_size[1], scale)
        self._image.update_image(_image(self._last_panel))
        return True

    def _layout(self, _context: gui.LayoutContext) -> None:
        area = self._window.content_rect
        width = min(round(PANEL_WIDTH * self._window.scaling), area.width // 2)
        self._image.frame = gui.Rect(area.x, area.y, width, area.height)
        self._widget.frame = gui.Rect(area.x + width, area.y, area.width - width, area.height)
        self._panel_size = (width, area.height)

    def _press(self, event: gui.KeyEvent) -> bool:
        key = _GUI_KEYS.get(int(event.key))
        return key is not None and (event.type is not gui.KeyEvent.Type.DOWN or self.view.press(key))

    def _mouse(self, event: gui.MouseEvent) -> gui.Widget.EventCallbackResult:
        if event.type in (gui.MouseEvent.Type.DRAG, gui.MouseEvent.Type.WHEEL):
            self.view.eye = Eye.FREE
        return gui.Widget.EventCallbackResult.IGNORED

    def _close(self) -> bool:
        """The user wants the window closed: it is, by `close`, once the last picture has been taken."""
        self.view.wants_quit = True
        return self._may_close


@contextmanager
def quiet_engine() -> Iterator[None]:
    """Keeps what the rendering engine says about itself from the standard output of the program."""
    o3d.utility.set_verbosity_level(o3d.utility.VerbosityLevel.Error)
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _geometry(chunk: Chunk) -> o3d.t.geometry.PointCloud | o3d.t.geometry.LineSet:
    points = o3d.core.Tensor.from_numpy(chunk.points)
    colors = o3d.core.Tensor.from_numpy(chunk.colors)
    if chunk.lines is None:
        cloud = o3d.t.geometry.PointCloud(points)
        cloud.point.colors = colors
        return cloud
    lines = o3d.t.geometry.LineSet(points, o3d.core.Tensor.from_numpy(chunk.lines))
    lines.line.colors = colors
    return lines


def _image(picture: NDArray[np.uint8]) -> o3d.geometry.Image:
    return o3d.geometry.Image(np.ascontiguousarray(picture).data)


def _look(camera: rendering.Camera, gaze: Gaze, aspect: float) -> None:
    camera.set_projection(FIELD_OF_VIEW_DEG, aspect, gaze.near, gaze.far, rendering.Camera.FovType.Vertical)
    camera.look_at(*(vector.astype(np.float32) for vector in (gaze.target, gaze.eye, gaze.up)))


def _line_material(width: float) -> rendering.MaterialRecord:
    material = rendering.MaterialRecord()
    material.shader, material.line_width = "unlitLine", width
    return material


def _point_material(size: float) -> rendering.MaterialRecord:
    material = rendering.MaterialRecord()
    material.shader, material.point_size = "defaultUnlit", size
    return material
