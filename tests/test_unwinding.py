"""A signal at any moment: its own exit status, and nothing left next to the output."""

import os
import shutil
import signal

import pytest

from megatron_long.files import atomic_path
from megatron_long.job.unwinding import ENDING, unwound_by_signals


@pytest.mark.parametrize("number", ENDING)
def test_a_writer_that_fails_on_the_way_out_does_not_hide_the_signal(number):
    """torch's archive misses the end of its file, and says so with a `RuntimeError`."""

    def write() -> None:
        try:
            signal.raise_signal(number)
        finally:
            for other in ENDING:
                signal.raise_signal(other)  # they are ignored while files are removed
            raise RuntimeError("unexpected position")

    with pytest.raises((SystemExit, KeyboardInterrupt)) as left, unwound_by_signals():
        write()
    expected = None if number == signal.SIGINT else 128 + number
    assert getattr(left.value, "code", None) == expected
    assert left.type is (KeyboardInterrupt if number == signal.SIGINT else SystemExit)


def test_errors_without_a_signal_stay_what_they_are():
    with pytest.raises(RuntimeError, match="own"), unwound_by_signals():
        raise RuntimeError("own")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_stay_ignored(number, monkeypatch):
    """`nohup` ignores SIGHUP, and a shell SIGINT of what it starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with unwound_by_signals():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("moment", ["first rename", "second rename", "removal"])
def test_a_signal_while_a_folder_is_replaced(moment, tmp_path, monkeypatch):
    """The folder is the old one or the new one, whole, and lies there alone."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    rename, rmtree, calls = os.rename, shutil.rmtree, []

    def renamed(source, to):
        rename(source, to)
        calls.append(to)
        if len(calls) == {"first rename": 1, "second rename": 2}.get(moment):
            signal.raise_signal(signal.SIGTERM)

    def removed(path, *args, **kwargs):
        if moment == "removal" and not calls[2:]:
            calls.append(path)
            (path / "weights").unlink()
            signal.raise_signal(signal.SIGTERM)
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    with (
        pytest.raises(SystemExit),
        unwound_by_signals(),
        atomic_path(target, directory=True) as folder,
    ):
        (folder / "weights").write_text("new")
    assert list(tmp_path.iterdir()) == [target]
    expected = "old" if moment == "first rename" else "new"
    assert (target / "weights").read_text() == expected
