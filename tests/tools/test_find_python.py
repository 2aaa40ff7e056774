"""tools/find_python.sh: the first interpreter that megatron-core runs on, or a clear message."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"


def find(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", SCRIPT], env={"PATH": str(path)}, capture_output=True, text=True
    )


def fake_python(path: Path, version: str) -> None:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version} && exit 0\nexit 1\n')
    path.chmod(0o755)


def test_old_python3_is_passed_over(tmp_path):
    fake_python(tmp_path / "python3", "3.11.2")
    (tmp_path / "python3.12").symlink_to(sys.executable)
    found = find(tmp_path)
    assert found.returncode == 0
    assert Path(found.stdout.strip()).exists()


def test_none_is_said_with_remedy(tmp_path):
    fake_python(tmp_path / "python3", "3.11.2")
    found = find(tmp_path)
    assert found.returncode == 2
    assert "no Python 3.12 or 3.13 found (python3 is: Python 3.11.2)" in found.stderr
    assert "python3.12-venv" in found.stderr
