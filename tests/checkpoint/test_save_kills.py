"""Kills at every file operation of a save: the checkpoint before or the new one is left and can be loaded."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_long.checkpoint import choosing
from megatron_long.checkpoint.choosing import check_whole, has_checkpoint, saved_iterations
from megatron_long.checkpoint.hashes import hash_files, leave_shard_hashes
from megatron_long.checkpoint.saving import CheckpointKeeper

STEPS = (2, 4, 6)
"""Iterations saved one after the other; the last one deletes the first (`--keep-last 2`)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Alone:
    """The only process of a job."""

    rank = 0

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, item):
        return [item]


def write_checkpoint(folder: Path, text: str) -> None:
    """Write files in the order in which Megatron does."""
    for name in ("__0_0.distcp", ".metadata", "common.pt"):
        (folder / name).write_text(f"{text} in {name}")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    leave_shard_hashes(folder, 0, hash_files(folder, ["__0_0.distcp"]))


def save(out: Path, iteration: int, in_background: bool) -> None:
    keeper = CheckpointKeeper(Alone(), out, lambda: {"step": iteration}, keep_last=2)
    request = SimpleNamespace(finalize_fns=[])

    def write(folder: Path) -> SimpleNamespace | None:
        write_checkpoint(folder, f"step {iteration}")
        return request if in_background else None

    keeper.write(out / f"iter_{iteration:07d}", write)
    for finalize in request.finalize_fns:
        finalize()


def dies_at(number: int, action: Callable[[], None], *, torn: bool) -> bool:
    """Whether SIGKILL before the given change of the file system ends a forked process that acts.

    Args:
        torn: Whether a file that would be opened then has its first byte already.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.addaudithook(killer(number, torn))
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def killer(number: int, torn: bool) -> Callable[[str, tuple], None]:
    seen = 0

    def hook(event: str, values: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = values
            if not flags & WRITING or not isinstance(path, str | os.PathLike):
                return
        elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        seen += 1
        if seen != number:
            return
        if event == "open" and torn:
            seen += 1  # this one opens a file, too
            Path(values[0]).write_bytes(b"{")
        os.kill(os.getpid(), signal.SIGKILL)

    return hook


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_a_kill_at_any_file_operation_of_a_save(in_background, tmp_path, monkeypatch):
    """Of the first save, a second one, and one that deletes the oldest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # kills lose nothing that is written
    out, before = tmp_path / "out", tmp_path / "before"
    out.mkdir()
    for past, step in zip((None, *STEPS), STEPS, strict=False):
        kept = saved_iterations(out)
        shutil.copytree(out, before)
        number, kills = 1, 0
        for torn in (False, True):
            number = 1
            while dies_at(number, lambda: save(out, step, in_background), torn=torn):  # noqa: B023
                number, kills = number + 1, kills + 1
                check_after_kill(out, past, step, kept)
                shutil.rmtree(out)
                shutil.copytree(before, out)
        assert kills > 30
        shutil.rmtree(before)
        assert chosen(out) == step


def check_after_kill(out: Path, past: int | None, step: int, kept: list[int]) -> None:
    choosing.remove_leftovers(out)
    assert not list(out.glob(".iter_*"))
    whole = saved_iterations(out)
    assert all(check_whole(out / f"iter_{iteration:07d}") for iteration in whole)
    assert set(whole) >= set(kept[:1])
    assert len(whole) >= min(2, len(kept))
    if has_checkpoint(out):
        assert chosen(out) in (past, step)
    else:
        assert past is None  # the same command starts where it started first
    save(out, step, in_background=False)
    assert chosen(out) == step
    assert saved_iterations(out) == [step, *kept][:2]
    names = {path.name for path in out.iterdir() if not path.name.startswith("iter_")}
    assert {name for name in names if not name.endswith(".tmp")} == {
        "hashes.json",
        "latest_checkpointed_iteration.txt",
    }


def chosen(out: Path) -> int | None:
    choice = choosing.choose_checkpoint(out)
    assert choice.checked
    assert all("latest_checkpointed_iteration.txt" in report for report in choice.reports)
    return choice.iteration
