"""The machine a benchmark ran on: what decides its figures. Light to import, for tools that must stay small."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What multiplies matrices fast, or fails to.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and system.

    num_cores     that this process may use.
    cpu_flags     instruction sets that matter for neural networks.
    num_threads   of PyTorch, None where nothing of PyTorch ran.
    omp_wait_policy  of the environment; empty: the library's own.
    gpu           its name, None where none was used.
    """

    cpu: str
    num_cores: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int | None
    system: str
    num_threads: int | None = None
    omp_wait_policy: str = ""
    gpu: str | None = None
    gpu_memory_bytes: int | None = None


def read_machine(
    num_threads: int | None = None, gpu: str | None = None, gpu_memory_bytes: int | None = None
) -> Machine:
    """This machine; the arguments are what only PyTorch knows."""
    model, flags = parse_cpuinfo(_read_lines(Path("/proc/cpuinfo")))
    return Machine(
        cpu=model or platform.processor() or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=flags,
        memory_bytes=parse_meminfo(_read_lines(Path("/proc/meminfo"))),
        system=f"{platform.system()} {platform.machine()}",
        num_threads=num_threads,
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory_bytes,
    )


def parse_cpuinfo(lines: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Model name and telling flags of Linux's /proc/cpuinfo; empty where it does not say."""
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", ""), tuple(flag for flag in _TELLING_FLAGS if flag in present)


def parse_meminfo(lines: Iterable[str]) -> int | None:
    """Bytes of memory of Linux's /proc/meminfo, None where it does not say."""
    for line in lines:
        key, _, value = line.partition(":")
        if key == "MemTotal":
            return int(value.split()[0]) * 1024
    return None


class CpuWatch:
    """How much of the processors other work takes, from now on: it is what makes times of this process worthless."""

    def __init__(self) -> None:
        self._start = self._now()

    def others_share(self) -> float | None:
        """Share of all processor time since the beginning that was not idle and not ours; None where it is unknown."""
        (busy0_s, total0_s, own0_s), (busy1_s, total1_s, own1_s) = self._start, self._now()
        if total1_s <= total0_s:
            return None
        return max(0.0, (busy1_s - busy0_s - (own1_s - own0_s)) / (total1_s - total0_s))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return (*parse_cpu_times(_read_lines(Path("/proc/stat"))), time.process_time())


def parse_cpu_times(lines: Iterable[str]) -> tuple[float, float]:
    """Busy and total processor time since the system started, s, of Linux's /proc/stat; zeros where it does not say."""
    for line in lines:
        name, *values = line.split()
        if name == "cpu":
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user already.
            ticks = [int(value) for value in values[:8]]
            idle = sum(ticks[3:5])
            ticks_per_s = os.sysconf("SC_CLK_TCK")
            return (sum(ticks) - idle) / ticks_per_s, sum(ticks) / ticks_per_s
    return 0.0, 0.0


def portable_source(name: str) -> str:
    """A source as the user wrote it, without the part of its path that says where this machine keeps its files.

    "kitti:/data/kitti/sequences/00" becomes "kitti:sequences/00"; a relative path loses the leading "..".
    """
    kind, colon, rest = name.partition(":")
    if not colon or "://" in name or os.sep in kind:
        kind, colon, rest = "", "", name
    if "://" in rest or os.sep not in rest:
        return name
    parts = [part for part in rest.split(os.sep) if part not in ("", ".", "..", "~")]
    return f"{kind}{colon}{'/'.join(parts[-2:])}"


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
