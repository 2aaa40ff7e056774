"""RULER's samples against its own generators, from a checkout that RULER_CHECKOUT names.

Set RULER_CHECKOUT to a clone of github.com/NVIDIA/RULER; its scripts need scipy, tenacity and tqdm. Without
NLTK's `punkt_tab` (NLTK_DATA), theirs cannot split essays, and those tasks are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import yaml

from megatron_long.evaluation.ruler.drawing import Request
from megatron_long.evaluation.ruler.ruler_definitions import CHAT_TEMPLATES, RULER_TASKS
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs, has_english_model
from megatron_long.evaluation.ruler.ruler_samples import make_samples

from .ruler_files import save_tokenizer, write_inputs

CHECKOUT = os.environ.get("RULER_CHECKOUT", "")
NUM_SAMPLES = 4
CASES = [
    (name, length, template, seed)
    for name, task in RULER_TASKS.items()
    for length, template, seed in (
        (2048, "base", 42),
        (8192, "vicuna-chat", 42),
        (20_000, "meta-chat", 7),
    )
    if task.options.get("haystack") != "essay" or has_english_model()
]
NUM_WORDS = 300
"""Of each kind; all of wonderwords take half a minute a script, and long lists take other words too."""
RUN = f"""
import json, runpy, sys
from wonderwords import random_word
sys.path.insert(0, ".")
read = random_word._get_words_from_text_file
random_word._get_words_from_text_file = lambda name: read(name)[:{NUM_WORDS}]
for argv in json.load(open(sys.argv[1])):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="RULER_CHECKOUT names no clone of NVIDIA/RULER"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> RulerInputs:
    written = write_inputs(tmp_path_factory.mktemp("inputs"))
    for name in ("nouns", "adjectives", "verbs"):
        vars(written)[name] = getattr(written, name)[:NUM_WORDS]
    return written


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, inputs) -> Path:
    """Samples of RULER's scripts, made in one process, with our input files in place of theirs."""
    folder = tmp_path_factory.mktemp("ruler")
    for path in Path(CHECKOUT).glob("scripts/data/**/*.py"):
        target = folder / path.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    scripts = folder / "scripts" / "data" / "synthetic"
    for name, path in (
        ("PaulGrahamEssays", inputs.haystack),
        ("squad", inputs.squad),
        ("hotpotqa", inputs.hotpotqa),
        ("english_words", inputs.english_words),
    ):
        (scripts / "json" / f"{name}.json").write_bytes(path.read_bytes())
    save_tokenizer(folder / "tokenizer")
    config = yaml.safe_load((Path(CHECKOUT) / "scripts" / "synthetic.yaml").read_text())
    commands = []
    for name, length, template, seed in CASES:
        shared = RULER_TASKS[name].shared
        words = [
            f"{config[name]['task']}.py",
            "--save_dir",
            folder,
            "--save_name",
            f"{name}-{length}-{template}",
        ]
        words += ["--tokenizer_path", folder / "tokenizer", "--tokenizer_type", "hf"]
        words += ["--max_seq_length", length, "--tokens_to_generate", shared.tokens_to_generate]
        whole = (
            CHAT_TEMPLATES[template].format(task_template=shared.template) + shared.answer_prefix
        )
        words += ["--random_seed", seed, "--num_samples", NUM_SAMPLES, "--template", whole]
        words += [
            word for key, value in config[name]["args"].items() for word in (f"--{key}", value)
        ]
        commands.append([str(word) for word in words])
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder / "commands.json"], cwd=scripts, check=False, timeout=400
    )
    assert done.returncode == 0
    return folder


@pytest.mark.parametrize(("name", "length", "template", "seed"), CASES)
def test_samples_are_those_of_nvidia(name, length, template, seed, theirs, inputs):
    lines = (theirs / f"{name}-{length}-{template}" / "validation.jsonl").read_text().splitlines()
    tokenizer = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer" / "tokenizer.json"))
    task = RULER_TASKS[name]
    generated = task.shared.tokens_to_generate
    request = Request(name, task, length, generated, CHAT_TEMPLATES[template], seed)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    ours = list(make_samples(request, inputs, encode, NUM_SAMPLES))
    assert len(ours) == len(lines) == NUM_SAMPLES
    for mine, other in zip(ours, map(json.loads, lines), strict=True):
        assert mine.prompt == other["input"] + other["answer_prefix"]
        assert list(mine.answers) == other["outputs"]
        assert len(mine.tokens) + generated == other["length"]
