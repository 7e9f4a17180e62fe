"""Memory of this machine, and buffers in files."""

import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fabricrl.utils.errors import ConfigError

GIB = 2**30


def check_memory(num_bytes: int, count: int, advice: str) -> None:
    """Raises ConfigError, with the figures, unless `count` replay buffers of this size fit into memory."""
    free = available_memory()
    if num_bytes * count > free:
        need = f"{count} × {num_bytes / GIB:.2f} GiB" if count > 1 else f"{num_bytes / GIB:.2f} GiB"
        raise ConfigError(
            f"--buffer-size: only {free / GIB:.2f} GiB of memory is free, too little for {need}; {advice}"
        )


def map_file(shape: tuple[int, ...], dtype: np.dtype, folder: Path) -> np.ndarray:
    """Zeros in a temporary memory-mapped file, which disappears with the process; its space is allocated at once.

    Raises:
        ConfigError: the disk has too little room.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # on a full disk, writing would be a crash later
            else:
                file.truncate(num_bytes)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        free = shutil.disk_usage(folder).free / GIB
        raise ConfigError(
            f"--buffer-memmap: cannot reserve {num_bytes / GIB:.2f} GiB in {folder}, where {free:.2f} GiB are free: "
            f"{error.strerror}"
        ) from error


def available_memory() -> float:
    """Bytes that this process can still take: what the system says, and no more than its control group may."""
    free = math.inf
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = float(line.split()[1]) * 1024
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        cached = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        free = min(free, int(text) - int(used.read_text()) + int(cached.get("inactive_file", 0)))
    return free
