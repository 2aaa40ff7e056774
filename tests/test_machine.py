"""Host memory within cgroups of both versions, and free disk, from files as Linux writes them."""

import shutil
from pathlib import Path

import pytest

from megatron_long.machine import free_disk, host_memory

GIB = 2**30
MEMINFO = (
    f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable:   {40 * GIB // 1024} kB\nHugePages_Total: 0\n"
)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def version_2(folder: str, most: object, used: int, cache: int) -> dict[str, object]:
    place = f"sys/fs/cgroup/{folder}/"
    return {
        f"{place}memory.max": f"{most}\n",
        f"{place}memory.current": f"{used}\n",
        f"{place}memory.stat": f"anon {used}\nactive_file {cache // 2}\ninactive_file {cache // 2}\n",
    }


def version_1(folder: str, most: int, used: int, cache: int) -> dict[str, object]:
    place = f"sys/fs/cgroup/memory/{folder}/"
    return {
        f"{place}memory.limit_in_bytes": f"{most}\n",
        f"{place}memory.usage_in_bytes": f"{used}\n",
        f"{place}memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}\ntotal_active_file 0\n",
    }


V2 = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/job_7/step_0\n"}
V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/slurm/job_7\n0::/\n",
}


@pytest.mark.parametrize(
    ("files", "expected_gib", "where"),
    [
        (V2, 40, "MemAvailable"),
        (V2 | version_2("job_7/step_0", "max", 3, 0), 40, "MemAvailable"),
        (V2 | version_2("job_7/step_0", 16 * GIB, 6 * GIB, 2 * GIB), 12, "step_0/memory.max"),
        # SLURM limits the job, not the step; the tightest counts.
        (
            V2
            | version_2("job_7/step_0", "max", 6 * GIB, 0)
            | version_2("job_7", 8 * GIB, 6 * GIB, 1 * GIB),
            *(3, "job_7/memory.max"),
        ),
        # A container sees its own group as the root.
        (
            {**V2, "proc/self/cgroup": "0::/\n"} | version_2(".", 10 * GIB, 1 * GIB, 0),
            *(9, "cgroup/memory.max"),
        ),
        (V1 | version_1("slurm/job_7", 20 * GIB, 5 * GIB, 4 * GIB), 19, "memory.limit_in_bytes"),
        (V1 | version_1("slurm/job_7", 9223372036854771712, 5 * GIB, 0), 40, "MemAvailable"),
        # Version 1 in a container: the path is the host's, the files are at the root.
        (V1 | version_1(".", 6 * GIB, 5 * GIB, 0), 1, "memory/memory.limit_in_bytes"),
        # More in use than allowed, as while the limit is lowered.
        (V2 | version_2("job_7", 4 * GIB, 5 * GIB, 0), 0, "job_7/memory.max"),
    ],
)
def test_tightest_limit_counts(files, expected_gib, where, tmp_path):
    room = host_memory(write(tmp_path, files))
    assert room.free_bytes == expected_gib * GIB
    assert where in room.where


def test_system_that_tells_nothing(tmp_path):
    assert host_memory(tmp_path) is None
    write(tmp_path, {"proc/self/cgroup": "nonsense", "proc/meminfo": "MemAvailable: much kB"})
    assert host_memory(tmp_path) is None


def test_this_machine_has_memory_and_disk(tmp_path):
    assert host_memory().free_bytes > 0
    room = free_disk(tmp_path / "not" / "yet")
    assert room.where == str(tmp_path)
    assert room.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    file = tmp_path / "file"
    file.touch()
    assert free_disk(file / "below") is None or free_disk(file / "below").free_bytes > 0
