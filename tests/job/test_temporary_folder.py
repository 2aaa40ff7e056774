"""A TMPDIR too long for the sockets of a save is told before training."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from megatron_long.errors import ConfigError
from megatron_long.training.start import hold_save

OPENS_A_SOCKET = """
import multiprocessing
with multiprocessing.get_context("fork").Manager() as manager:
    assert manager.Queue().empty()
"""


@pytest.fixture
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The temporary folder, with a path of as many characters as asked for."""
    top = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    path = f"{top}/{'f' * (request.param - len(top) - 1)}"
    os.mkdir(path)
    monkeypatch.setattr(tempfile, "tempdir", path)
    yield path
    shutil.rmtree(top)


def opens_a_socket(folder: str) -> bool:
    command = [sys.executable, "-c", OPENS_A_SOCKET]
    environment = {**os.environ, "TMPDIR": folder}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("folder", [75], indirect=True)
def test_the_longest_that_is_taken_has_room_for_a_socket(folder):
    hold_save("absent")
    assert opens_a_socket(folder)


@pytest.mark.parametrize("folder", [76], indirect=True)
def test_a_longer_one_is_refused(folder):
    assert not opens_a_socket(folder)
    with pytest.raises(
        ConfigError, match=r"has 76 bytes, and at most 75 .* set TMPDIR to a shorter"
    ):
        hold_save("absent")
    hold_save(None)  # nothing is saved
