"""Published recipes: each command that their scripts give is one that its parser accepts."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_long import command_line
from megatron_long.commands.preprocess_mix import build_parser
from megatron_long.errors import ConfigError
from megatron_long.flags.argv import Argv
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.published import PUBLISHED
from megatron_long.flags.published_script import as_script, as_table
from megatron_long.flags.recipe import RECIPES
from megatron_long.preprocess.preprocess_config import read_config
from tests.conftest import write_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >> "$WORK/calls"
printf '\\n\\0' >> "$WORK/calls"
"""


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder, tiny_tokenizer)
    return folder


@pytest.fixture
def run_script(tmp_path, model):
    """A function that runs a script whose `megatron-long` only records its words: those of each call."""

    def run(text: str, **environment: str) -> list[list[str]]:
        (tmp_path / "bin").mkdir()
        stub = tmp_path / "bin" / "megatron-long"
        stub.write_text(STUB)
        stub.chmod(0o755)
        work, corpus = tmp_path / "a work", tmp_path / "a corpus"
        corpus.mkdir()
        paths = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "WORK": str(work)}
        paths |= {"CORPUS": str(corpus), "MODEL": str(model)} | environment
        subprocess.run(["bash", "-c", text], env=paths, check=True)
        calls = (work / "calls").read_bytes().decode().split("\n\0")
        return [call.split("\0")[:-1] for call in calls[:-1]]

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_commands_are_accepted(name, run_script, model, tiny_dataset, tmp_path):
    recipe = PUBLISHED[name]()
    calls = run_script(as_script(recipe), BASE="tiny_debug")
    assert len(calls) == 2 * len(recipe.stages)
    pairs = zip(calls[::2], calls[1::2], recipe.stages, strict=True)
    for number, (data, training, stage) in enumerate(pairs, 1):
        assert data[0] == "preprocess"
        config = read_config(build_parser().parse_args(data[1:]))
        shares = config.mixture.source_shares
        assert shares == (stage.shares or ("slimpajama" if name == "paper" else "natural"))
        assert not stage.shares or sum(stage.shares.values()) == pytest.approx(1)
        assert config.seed == number - 1

        start = training.index("megatron_long.pretrain") + 1
        assert training[:start] == [
            "launch",
            "--nproc-per-node",
            "8",
            "-m",
            "megatron_long.pretrain",
        ]
        argv = Argv(training[start:])
        output = str(tmp_path / "a work" / f"data-{number}")
        assert argv.value("--dataset") == output == Argv(data[1:]).value("--output")
        before = str(tmp_path / "a work" / f"run-{number - 1}") if number > 1 else None
        kept = before if stage.keeps_optimizer else None
        assert argv.value("--next-stage-of") == kept
        assert argv.value("--pretrained-checkpoint") == (None if kept else before)
        assert argv.value("--hf-checkpoint") == (str(model) if number == 1 else None)
        # What the stages before would have made is not there.
        starts = ("--next-stage-of", "--pretrained-checkpoint", "--hf-checkpoint", "--load")
        words = argv.without(*starts)
        words = [*words.replaced("--dataset", tiny_dataset), "--hf-config", str(model)]
        _, args = command_line.parse([*words, "--allow-repeat"], HOST, 1)
        for flag, value in {**stage.rope, **stage.schedule}.items():
            assert getattr(args, flag.removeprefix("--").replace("-", "_")) == value
        assert args.document_masking is stage.masks_documents
        if stage.seq_length is None:
            continue
        assert args.seq_length == stage.seq_length <= args.max_position_embeddings
        windows = args.train_samples or args.train_iters * args.global_batch_size
        assert (
            config.mixture.train_tokens == windows * args.seq_length + 1
        )  # one pass, to the token
        assert (
            0
            <= stage.train_tokens - windows * args.seq_length
            < max(stage.tokens_per_batch or 0, stage.seq_length)
        )
        if stage.tokens_per_batch:
            assert args.global_batch_size * args.seq_length == stage.tokens_per_batch
        else:
            assert args.train_samples


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_budget_keeps_the_batch_and_the_share_of_the_warmup(name):
    recipe = PUBLISHED[name]()
    scaled = recipe.with_tokens(1_000_000_000)
    for before, stage in zip(recipe.stages, scaled.stages, strict=True):
        assert 0 <= 1_000_000_000 - stage.num_windows * stage.seq_length < 9_000_000
        assert stage.tokens_per_batch == before.tokens_per_batch
        assert stage.data == before.data
        argv, old = Argv(stage.training_argv()), Argv(before.training_argv())
        assert argv.value("--lr") == old.value("--lr")
        if before.tokens_per_batch and (warmup := old.value("--lr-warmup-iters")):
            share = int(warmup) / int(old.value("--train-iters"))
            steps = int(argv.value("--train-iters"))
            assert 0 <= share * steps - int(argv.value("--lr-warmup-iters")) < 1
    with pytest.raises(
        ConfigError, match=r"--train-tokens 1000 is less than the [\d,]+ tokens of a step"
    ):
        recipe.with_tokens(1000)


def test_the_paper_has_the_flags_of_its_recipe_alone():
    (stage,) = PUBLISHED["paper"]().stages
    assert stage.training_argv() == []
    assert PUBLISHED["paper"]().base == "llama2_7b_80k"


def test_a_base_is_a_recipe_and_names_do_not_clash():
    assert {make().base for make in PUBLISHED.values()} <= set(RECIPES)
    assert not set(RECIPES) & set(PUBLISHED)


def test_the_page_compares_them_as_they_are():
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert as_table() in page
    for make in PUBLISHED.values():
        for text in (*make().sources, *make().notes):
            assert text in " ".join(page.split())


GOLDEN = {
    "llama2_7b_80k": "f6752adc8fd9a65e",
    "llama2_7b_128k": "8f57e9e709d661a7",
    "llama2_13b_64k": "2fe548c94fe5fd43",
    "llama3_8b_128k": "b3176e1d878da3f2",
    "llama3_70b_128k": "8d9f5243f7ee4a14",
    "tiny_debug": "656afcfc2c2321a0",
}


@pytest.mark.parametrize("name", RECIPES)
def test_flags_of_the_recipes_are_those_of_version_0_2(name):
    argvs = [
        RECIPES[name]().to_argv(backend, own_loss=own_loss)
        for backend in (GPU, HOST)
        for own_loss in (False, True)
    ]
    assert hashlib.sha256(json.dumps(argvs).encode()).hexdigest()[:16] == GOLDEN[name]
