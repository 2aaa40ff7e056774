"""Every command of docs/evaluation.md is one that its tool takes."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_long.evaluation.live_evaluation import EvaluationArguments

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "evaluation.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
TOOLS = re.findall(r"tools/(\w+)\.py", "".join(BLOCKS))


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_takes_the_flags(tool):
    module = importlib.import_module(f"megatron_long.commands.{tool}")
    (block,) = [block for block in BLOCKS if f"{tool}.py" in block]
    words = shlex.split(block.replace("\\\n", " "))
    _, left = module.build_parser().parse_known_args(words[words.index(f"tools/{tool}.py") + 1 :])
    assert [word for word in left if word.startswith("--")] in ([], ["--context-parallel-size"])


def test_flags_of_training_are_told():
    told = {"--" + field.name.replace("_", "-") for field in fields(EvaluationArguments)}
    block = next(block for block in BLOCKS if "megatron_long.pretrain" in block)
    shown = set(re.findall(r"--(?:needle|position)[a-z-]+", block))
    assert shown
    assert shown <= told


def test_the_work_of_the_grid_is_as_told():
    assert "260 forward passes over 26.8M tokens, 41% of" in TEXT
