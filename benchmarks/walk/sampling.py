"""Peak memory of the node and of its GPUs while a command runs, sampled."""

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_BETWEEN_GPU_SAMPLES = 2.0
"""nvidia-smi itself takes about one."""
GIB = 2**30
_CGROUP_FIELDS = (
    (Path("/sys/fs/cgroup/memory.stat"), ("anon", "shmem")),
    (Path("/sys/fs/cgroup/memory/memory.stat"), ("total_rss", "total_shmem")),
)


def cgroup_bytes() -> int | None:
    """Anonymous and shared memory of this cgroup (tmpfs included, page cache not); None without one."""
    for path, names in _CGROUP_FIELDS:
        try:
            values = dict(line.split() for line in path.read_text().splitlines())
            return sum(int(values[name]) for name in names)
        except (OSError, KeyError, ValueError):
            continue
    return None


def meminfo_bytes() -> int | None:
    """Anonymous and shared memory of the whole machine; None if the kernel does not report it."""
    try:
        values = dict(
            re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        )
        return 1024 * (int(values["AnonPages"]) + int(values["Shmem"]))
    except (OSError, KeyError, ValueError):
        return None


def tree_bytes() -> int:
    """Proportional memory (PSS) of this process's descendants; RSS of those that do not report it."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            found = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)
            total += 1024 * sum(map(int, found)) if found else child.memory_info().rss
        except (OSError, psutil.Error):
            continue
    return total


def host_meter() -> tuple[str, Callable[[], int]]:
    """How this machine's memory can be read: a name for it, and the reader."""
    if cgroup_bytes() is not None:
        return "cgroup anon + shmem", lambda: cgroup_bytes() or 0
    if meminfo_bytes():
        return "machine's AnonPages + Shmem", lambda: meminfo_bytes() or 0
    return "PSS of the processes", tree_bytes


def gpu_bytes() -> int:
    """Memory in use on the fullest GPU, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        return max((int(word) for word in text.split()), default=0) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


@dataclass
class Peaks:
    """Samples memory in threads from `start` to `stop`."""

    host: int = 0
    """Bytes, with what was in use at the start."""
    host_start: int = 0
    gpu: int = 0
    method: str = ""
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> "Peaks":
        self.method, read = host_meter()
        self.host_start = self.host = read()

        def sample_host() -> None:
            while not self._end.wait(SECONDS_BETWEEN_SAMPLES):
                self.host = max(self.host, read())

        def sample_gpus() -> None:
            while not self._end.wait(SECONDS_BETWEEN_GPU_SAMPLES):
                self.gpu = max(self.gpu, gpu_bytes())

        targets = [sample_host, *([sample_gpus] if shutil.which("nvidia-smi") else [])]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> dict[str, object]:
        """Stop; returns the memory figures of a record."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        return {
            "host_peak_gb": round(self.host / 1e9, 3),
            "host_start_gb": round(self.host_start / 1e9, 3),
            "host_method": self.method,
            "gpu_smi_gib": round(self.gpu / GIB, 1),
        }
