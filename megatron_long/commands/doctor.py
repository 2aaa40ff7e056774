"""Say what this machine offers for training, which fast paths are active, and what to fix.

Needs no GPU. Exits with 1 where something is a problem.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_long.planning.diagnosis import Finding, examine

MARKS = {"ok": " ", "note": "-", "problem": "!"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        help="folder for checkpoints, whose disk is looked at",
    )
    parser.add_argument(
        "--recipe",
        help="what is to be trained: no room for one of its checkpoints is a problem (without: a note, for "
        "llama3_8b_128k)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    findings = examine(arguments.output, arguments.recipe)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(map(line, findings)))
    problems = sum(finding.state == "problem" for finding in findings)
    if not arguments.json:
        print(f"\n{problems} problems (!)" if problems else "\nno problems")
    return 1 if problems else 0


def line(finding: Finding) -> str:
    """One finding as a line of the table."""
    text = f"{MARKS[finding.state]} {finding.name:24} {finding.value}"
    return text if finding.state == "ok" or not finding.remedy else f"{text} ({finding.remedy})"
