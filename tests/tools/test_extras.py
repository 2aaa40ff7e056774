"""What `pip install -e ".[extra]"` asks for is there, in the spelling that any pip takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
NO_NETWORK = re.compile(
    "Failed to establish a new connection|Temporary failure in name resolution|Name or service not known|"
    "ConnectTimeoutError|Network is unreachable"
)
EXPECTED = {"gpu": {"transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"}}
"""Packages that an extra is for, and that a wrong spelling loses with a mere warning."""


def read_extras() -> dict[str, list[Requirement]]:
    """`extras_require`, as setuptools is told."""
    code = (
        "import json, runpy, setuptools; told = {}; setuptools.setup = lambda **named: told.update(named); "
        "runpy.run_path('setup.py'); print(json.dumps(told['extras_require']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return {
        name: [Requirement(text) for text in texts]
        for name, texts in json.loads(result.stdout).items()
    }


EXTRAS = read_extras()


def read_pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_extras_of_others_are_spelt_as_their_metadata_spell_them():
    """pip before 23.3 compares the words as they are: `core_cu13` was dropped with a warning."""
    asked = [
        (item.name, extra) for items in EXTRAS.values() for item in items for extra in item.extras
    ]
    assert ("transformer-engine", "core-cu13") in asked
    assert [pair for pair in asked if canonicalize_name(pair[1]) != pair[1]] == []


def test_pins_are_what_the_extras_allow():
    pins = read_pins()
    for name in EXPECTED["gpu"]:
        assert pins[name] == Version(
            "2.20.2"
        )  # what was tested on GPUs: its parts must be of one release
    for items in EXTRAS.values():
        for item in items:
            pin = pins.get(canonicalize_name(item.name))
            assert pin is None or item.specifier.contains(pin, prereleases=True), item


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_resolves(extra, tmp_path):
    """With the pip and the index of this machine; metadata alone are fetched, nothing is installed."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation"]
    command += ["--ignore-installed", "--no-deps"] if extra not in EXPECTED else []
    command += ["-c", "constraints.txt", "--report", str(report), *map(str, EXTRAS[extra])]
    own = os.environ | {"TMPDIR": str(tmp_path)}  # pip leaves what it unpacks for its metadata
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=own)
    output = result.stdout + result.stderr
    if result.returncode and NO_NETWORK.search(output):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, output[-3000:]
    assert "does not provide the extra" not in output
    named = {
        canonicalize_name(item["metadata"]["name"])
        for item in json.loads(report.read_text())["install"]
    }
    present = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True
    )
    named |= {canonicalize_name(item["name"]) for item in json.loads(present.stdout)}
    assert {canonicalize_name(item.name) for item in EXTRAS[extra]} | EXPECTED.get(
        extra, set()
    ) <= named
