"""Markdown tables of a walk's records, and a comparison with the limits."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from benchmarks.walk import logs
from benchmarks.walk.context import read_records
from benchmarks.walk.phases import PHASES
from benchmarks.walk.settings import Settings

START_BOUND_S = 90
ASYNC_BOUND_S = 10
MEMORY_BOUND = 1.5
"""Host memory of a save over the bytes of the checkpoint."""
SAME_LAYOUT_NATS = 1e-3
"""Smallest difference allowed for FP8's own repeatability; ten times the difference of the steps
before the interruption, if that is more."""
OTHER_LAYOUT_NATS = 2e-2
"""Other products, and in tensorwise FP8 other scales: TP cuts the tensors that share a scale."""
TRANSFORMERS_NATS = 5e-3
"""BF16 in both, each with kernels of its own: the mean over some 10,000 tokens; 2e-4 in FP32 (the host)."""
TRANSFORMERS_FP32_NATS = 2e-4

Records = dict[str, dict[str, Any]]
Bound = tuple[str, str, str, bool]
"""Limit, allowed value, measured value, whether it holds."""


def phase_table(records: Records) -> str:
    """One row per phase."""
    rows = [
        "| phase | s | GB | GB/s | peak GPU GiB (torch; nvidia-smi) | peak host GB (at its start) | status |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PHASES:
        if name in records:
            rows.append(_row(name, records[name]))
    return "\n".join(rows)


def _row(name: str, record: dict[str, Any]) -> str:
    moved, seconds = record.get("moved_gb"), record["seconds"]
    speed = f"{moved:.1f} | {moved / seconds:.2f}" if moved else " | "
    gpu = "; ".join(str(record.get(key) or "-") for key in ("gpu_torch_gib", "gpu_smi_gib"))
    host = f"{record['host_peak_gb']:.1f} ({record['host_start_gb']:.1f})"
    if record.get("beside"):
        name += f" (concurrent with {', '.join(record['beside'])})"
    status = shorten(record["status"], 100, placeholder="...")
    return f"| {name} | {seconds:.0f} | {speed} | {gpu} | {host} | {status} |"


def start_table(records: Records) -> str:
    """The times from launch to the first step, of each run."""
    runs = {name: r["start_s"] for name, r in records.items() if r.get("start_s")}
    if not runs:
        return ""
    parts = [name for name, _ in logs.START_MARKS if any(name in run for run in runs.values())]
    rows = [f"| launch to first step, s | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for part in parts:
        rows.append(f"| {part} | {' | '.join(str(run.get(part, '')) for run in runs.values())} |")
    total = [f"**{records[name]['launch_to_first_step_s']}**" for name in runs]
    first = [str(records[name]["first_step_s"]) for name in runs]
    rows.append(f"| all | {' | '.join(total)} |")
    return "\n".join([*rows, f"| the first step itself | {' | '.join(first)} |"])


def bounds(records: Records) -> list[Bound]:
    """The limits and the measured values."""
    found: list[Bound] = []
    rates = records.get("disk", {}).get("rates_gb_per_s")
    train = records.get("train", {})
    size = train.get("checkpoint_gb", 0.0)
    if train.get("save_s"):
        save = max(map(float, train["save_s"].values()))
        host = train["host_peak_gb"] - train["host_start_gb"]
        if rates:
            bound = 2 * size * (1 / rates["write"] + 1 / rates["hash"])
            found.append(
                (
                    f"save of {size:.1f} GB: 2 x (stream + hash)",
                    f"{bound:.1f} s",
                    f"{save:.1f} s ({size / save:.2f} GB/s)",
                    save <= bound,
                )
            )
        limit = MEMORY_BOUND * size
        found.append(
            (
                "host memory of the node, including training: 1.5 x the checkpoint",
                f"{limit:.1f} GB",
                f"{host:.1f} GB",
                host <= limit,
            )
        )
    found += _loads(records, rates)
    for name in ("train", "uninterrupted", "async"):
        seconds = records.get(name, {}).get("launch_to_first_step_s")
        if seconds:
            found.append(
                (
                    f"launch to the first step ({name})",
                    f"{START_BOUND_S} s",
                    f"{seconds:.1f} s",
                    seconds < START_BOUND_S,
                )
            )
    stopped = records.get("async", {}).get("stopped_s")
    if stopped is not None:
        found.append(
            (
                "training stops for --async-save",
                f"{ASYNC_BOUND_S} s",
                f"{stopped} s",
                stopped <= ASYNC_BOUND_S,
            )
        )
    return found


def _loads(records: Records, rates: dict[str, float] | None) -> list[Bound]:
    """Loading with its hashes: Megatron's own, and what the part of a start before it takes longer."""
    found: list[Bound] = []
    hashing = logs.START_MARKS[1][0]
    before = records.get("train", {}).get("start_s", {}).get(hashing)
    for name in ("resume", "reshard"):
        record = records.get(name, {})
        imports = record.get("start_s", {}).get(hashing)
        if rates and before and imports and record.get("load_s"):
            size, hashed = record["checkpoint_gb"], max(0.0, imports - before)
            cached, disk = (2 * size / rates[key] for key in ("read_cached", "read_disk"))
            load = record["load_s"] + hashed
            shown = f"{load:.1f} s ({size / load:.2f} GB/s), of which hashes {hashed:.1f} s"
            found.append(
                (
                    f"load in {name}: reading {size:.1f} GB twice",
                    f"{cached:.1f} s (from the disk {disk:.1f} s)",
                    f"{shown} (more before Megatron than in train)",
                    load <= max(cached, disk),
                )
            )
    return found


def comparisons(folder: Path, settings: Settings, on_gpu: bool) -> list[Bound]:
    """Losses of the interrupted run and the resharded one against those of an uninterrupted run."""
    logged = {path.stem: logs.read_losses(path) for path in (folder / "results").glob("*.jsonl")}
    whole = logged.get("uninterrupted") or logged.get("async")
    before = logged.get("train", {})
    found: list[Bound] = []
    if whole and before:
        same = {step: abs(before[step] - whole[step]) for step in before if step in whole}
        noise = max(same.values(), default=0.0)
        shown = _differences(same)
        allowed = 0.0 if settings.deterministic else max(SAME_LAYOUT_NATS, 10 * noise)
        found.append(("two runs before the interruption", _limit(allowed), shown, noise <= allowed))
        for name, limit in (("resume", allowed), ("reshard", max(OTHER_LAYOUT_NATS, allowed))):
            after = logged.get(name)
            if after:
                off = {s: abs(after[s] - whole[s]) for s in after if s in whole}
                good = bool(off) and max(off.values()) <= limit
                found.append(
                    (f"{name} against uninterrupted", _limit(limit), _differences(off), good)
                )
    record = read_records(folder).get("transformers", {})
    if "difference" in record:
        limit = TRANSFORMERS_NATS if on_gpu else TRANSFORMERS_FP32_NATS
        shown = (
            f"{record['difference']:.2e} ({record['megatron']:.5f}, {record['transformers']:.5f})"
        )
        good = record["difference"] <= limit
        found.append(("transformers against Megatron", _limit(limit), shown, good))
    return found


def _limit(nats: float) -> str:
    return f"{nats:.1e}" if nats else "equal bits"


def _differences(off: dict[int, float]) -> str:
    return ", ".join(f"step {step}: {value:.2e}" for step, value in sorted(off.items())) or "none"


def report(folder: Path, settings: Settings) -> str:
    """All tables, in the format of docs/results.md."""
    records = read_records(folder)
    on_gpu = any(record.get("gpu_smi_gib") for record in records.values())
    tensor, context = settings.layout
    head = (
        f"{settings.size} model of {settings.num_parameters / 1e9:.3f} billion parameters "
        f"({settings.geometry.num_layers} layers), {settings.processes} "
        f"{'GPUs' if on_gpu else 'processes on the host'}, TP{tensor} CP{context}, {settings.windows} x "
        f"{settings.seq_length:,} tokens a step, {'FP8' if settings.fp8 else 'no FP8'}"
        f"{', --deterministic-mode' if settings.deterministic else ''}"
    )
    methods = {record["host_method"] for record in records.values() if "host_method" in record}
    memory = (
        f"Host memory: {', '.join(sorted(methods))}, sampled every half second; tmpfs is included."
    )
    tables = [head, phase_table(records), memory, start_table(records)]
    for title, rows in (
        ("bound", bounds(records) if settings.is_full else []),
        ("loss, largest difference in nats", comparisons(folder, settings, on_gpu)),
    ):
        if rows:
            lines = [f"| {title} | allowed | measured | |", "|---|---|---|---|"]
            lines += [
                f"| {a} | {b} | {c} | {'holds' if ok else '**BROKEN**'} |" for a, b, c, ok in rows
            ]
            tables.append("\n".join(lines))
    return "\n\n".join(table for table in tables if table)
