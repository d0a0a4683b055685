"""Compile vo/kernels.c, as the build of the package does where there is a C compiler.

    python tools/build_kernels.py     compiles into the source tree; exit code 1 where that is not possible

Without a compiler the package is built all the same, and its geometry runs in NumPy. CC names another compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object  # type: ignore[assignment, misc]

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "vo" / "kernels.c"
LIBRARY = ROOT / "vo" / "lightvo_kernels.so"
# Sums may be made in any order; infinities and what is not a number keep their meaning.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
_TIMEOUT_S = 120


class KernelsBuildHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """What hatchling calls before it packs a wheel or installs the source tree."""

    PLUGIN_NAME = "kernels"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        problem = compile_kernels()
        if problem is not None:
            self.app.display_warning(f"lightvo: the geometry will run in NumPy: {problem}")
            return
        build_data["artifacts"].append(f"/vo/{LIBRARY.name}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def compile_kernels(library: Path = LIBRARY) -> str | None:
    """Compiles the source; says why it could not, and leaves no older library in its place."""
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    part = library.with_name(f"{library.name}.{os.getpid()}.part")
    compiler = shlex.split(os.environ.get("CC", "") or "cc")
    command = [*compiler, "-std=c11", *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden", f"-DSOURCE={source}"]
    try:
        library.unlink(missing_ok=True)
        run = subprocess.run(
            [*command, str(SOURCE), "-o", str(part), "-lm"], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        if run.returncode != 0:
            return f"{compiler[0]} failed: {(run.stderr.strip().splitlines() or ['no message'])[0]}"
        os.replace(part, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler[0]}: {error}"
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    failure = compile_kernels()
    print(f"build_kernels: {failure or LIBRARY}", file=sys.stderr if failure else sys.stdout)
    sys.exit(1 if failure else 0)
