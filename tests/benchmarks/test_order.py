import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/order.py"


def test_a_dataset_is_more_even_than_a_shuffle(tiny_dataset):
    command = [sys.executable, SCRIPT, "--dataset", tiny_dataset, "--window-tokens", "4K"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    mean = [float(line.split("off by ")[1].split()[0]) for line in lines]
    assert lines[0].startswith("dataset: ")
    assert len(mean) == 6
    assert mean[0] < min(mean[1:])
