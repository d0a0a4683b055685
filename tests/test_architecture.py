"""Arrows point one way: who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT) for package in ("vo", "frontends") for path in (ROOT / package).rglob("*.py"))

# Lower layers never import higher ones; modules of one layer may know each other.
LAYERS = (
    {"vo.types", "frontends"},
    {
        "vo.config",
        "vo.kernels",
        "vo.geometry",
        "vo.absolute_pose",
        "vo.relative_pose",
        "vo.first_pose",
        "vo.output",
        "vo.channel",
        "vo.wire",
        "vo.endpoints",
        "vo.keys",
        "vo.samples",
        "vo.interrupts",
        "vo.memory",
        "vo.service",
    },
    {
        "vo.config_loader",
        "vo.messages",
        "vo.message_types",
        "vo.map_messages",
        "vo.map_store",
        "vo.map_merge",
        "vo.sequences",
        "vo.sources",
        "vo.tracks",
        "vo.bundle",
        "vo.bundle_problem",
        "vo.bundle_equations",
        "vo.self_calibration",
        "vo.trajectory",
        "vo.recording",
        "vo.foxglove",
        "vo.camera_models",
        "vo.tracks_archive",
        "vo.ground_plane",
        "vo.image_health",
        "vo.stillness",
        "vo.stereo",
        "vo.calibration",
        "vo.calibration_boards",
        "vo.calibration_capture",
        "vo.calibration_corners",
        "vo.calibration_print",
        "vo.calibration_solver",
        "vo.calibration_verdict",
        "vo.calibration_window",
    },
    {
        "vo.window",
        "vo.odometry_step",
        "vo.scale",
        "vo.scale_source",
        "vo.posing",
        "vo.depth_chain",
        "vo.pair_poses",
        "vo.inbox",
        "vo.message_stream",
        "vo.preview",
        "vo.evaluation",
        "vo.plots",
        "vo.path_sketch",
        "vo.summary",
        "vo.calibration_report",
    },
    {"vo.scene", "vo.scene_view", "vo.scene_truth", "vo.scene_panel", "vo.scene_video", "vo.scene_live"},
    {
        "vo.live_map",
        "vo.odometry",
        "vo.two_view_odometry",
        "vo.modes",
        "vo.archive",
        "vo.publisher",
        "vo.client",
        "vo.keys_command",
        "vo.recorder",
        "vo.refined",
        "vo.frontend",
        "vo.mcap_recorder",
        "vo.replay",
        "vo.export_scene",
        "vo.export_formats",
    },
    {"vo.run_meter", "vo.listen", "vo.eval_runs", "vo.eval_report", "vo.eval_command"},
    {"vo.scene_feed", "vo.viewer", "vo.view_command", "vo.viewer_process"},
    {"vo.match_ahead", "vo.stages", "vo.progress", "vo.doctor", "vo.run_watch"},
    {"vo.pipeline", "vo.run_files"},
    {
        "vo.run_report",
        "vo.run_results",
        "vo.replay_command",
        "vo.export_input",
        "vo.export_images",
        "vo.export_command",
    },
    {
        "vo.bench_statistics",
        "vo.bench_machine",
        "vo.bench_peers",
        "vo.bench_stream",
        "vo.bench_report",
        "vo.bench_compare",
        "vo.bench",
        "vo.option_types",
    },
    {
        "vo.calibrate_command",
        "vo.run_command",
        "vo.batch_manifest",
        "vo.batch_jobs",
        "vo.batch_ray",
        "vo.batch_table",
        "vo.batch_command",
        "vo.matching_pairs",
        "vo.matching_scores",
        "vo.bench_matching",
    },
    {
        "vo.shared_options",
        "vo.live_options",
        "vo.results_options",
        "vo.bench_options",
        "vo.machine_options",
    },
    {"vo.cli"},
    {"vo.__main__"},
)
ONLY_IMPORTERS = {
    "zmq": {"vo/publisher.py", "vo/client.py", "vo/keys_command.py"},
    "evo": {"vo/evaluation.py"},
    "ray": {"vo/batch_ray.py"},
    "open3d": {"vo/viewer.py"},
    "mcap": {"vo/recording.py"},
    "foxglove_schemas_protobuf": {"vo/foxglove.py"},
}

MAX_LINES = 520
# Longer than they should be; these may shrink, not grow.
LONG_FILES: dict[str, int] = {}


def layer_of(module: str) -> int:
    """The layer of the longest listed prefix of a dotted name."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return number
    raise AssertionError(f"{module} stands in no layer: place it")


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Dotted names a file imports when it runs, wherever in the file; what only the type checker sees is left out."""
    return tuple(imports_in((ROOT / path).read_text()))


def imports_in(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    if path.parts[0] == "frontends":
        assert not [name for name in imports(path) if name.split(".")[0] == "vo"]
        return
    if dotted(path) == "vo":
        assert not list(name for name in imports(path) if name.startswith("vo."))
        return
    mine = layer_of(dotted(path))
    for name in imports(path):
        if name.split(".")[0] in ("vo", "frontends") and name != "vo.__version__":
            assert layer_of(name) <= mine, f"{path} imports {name}, which lies above it"


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_has_one_door(library):
    importers = {path.as_posix() for path in MODULES if any(name.split(".")[0] == library for name in imports(path))}
    assert importers <= ONLY_IMPORTERS[library]


def test_no_run_imports_what_only_training_needs():
    importers = [path for path in MODULES if any(name.startswith("frontends.training") for name in imports(path))]
    assert all(path.parts[:2] == ("frontends", "training") for path in importers)


def test_data_folders_hold_no_packages():
    """A package named `datasets` or `configs` would shadow others on the path."""
    assert not [folder for folder in ("datasets", "configs") if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_stay_short(path):
    """A ratchet: who splits a long file takes it out of the list."""
    num_lines = len((ROOT / path).read_text().splitlines())
    allowed = LONG_FILES.get(path.as_posix(), MAX_LINES)
    assert num_lines <= allowed, f"{path} has {num_lines} lines: split it"


def test_the_list_of_long_files_is_up_to_date():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in LONG_FILES}
    assert all(length > MAX_LINES for length in lengths.values()), f"short enough by now: {lengths}"
