"""Every command of README.md runs, with a small model instead of the large one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
SMALLER = {
    "SlimPajama/": "corpus.jsonl",
    "Meta-Llama-3-8B": "model",
    "long_book.txt": "haystack.txt",
    "--train-tokens 5B": "--train-tokens 16K --long-threshold 128 --allow-repeat 10",
    "--context-length 131072": "--context-length 512",
    "--context-parallel-size 4": "--context-parallel-size 2",
    "--nproc-per-node 8": "--nproc-per-node 4",
    "--world-size 8": "--world-size 4 --train-iters 2",
    "--recipe llama3_8b_128k": "--recipe tiny_debug --seq-length 512 --global-batch-size 4",
    "RECIPE=llama3_8b_128k": "RECIPE=tiny_debug",
    "examples/pretrain_llama_128k.sh": "examples/pretrain_llama_128k.sh --seq-length 512"
    " --global-batch-size 2 --train-iters 2 --tensor-model-parallel-size 2 --context-parallel-size 2",
    "--train-iters 10": "--train-iters 2",
    "--output-dir results/needle": "--output-dir results/needle --context-lengths 384 512 --num-depths 2",
}
"""What the test puts instead of the README's words; each must still be there."""


def shrink(block: str) -> str:
    """A block of the README for a tiny model, in one pass so that no replacement meets another."""
    pattern = re.compile(
        "|".join(re.escape(word) for word in sorted(SMALLER, key=len, reverse=True))
    )
    return pattern.sub(lambda match: SMALLER[match[0]], block)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_corpus, tiny_tokenizer) -> Path:
    """A folder as a user has it: corpus, Hugging Face model with tokenizer, a long text, the repository."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tools", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "corpus.jsonl").symlink_to(tiny_corpus)
    write_tiny_llama(folder / "model", tiny_tokenizer)
    sentence = "The token of the book is in the context of the model. "
    (folder / "haystack.txt").write_text(sentence * 400)
    return folder


def run(block: str, folder: Path, python: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "NPROC_PER_NODE": "4",
        "PET_STANDALONE": "1",  # torchrun: a free port, not 29500
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shrink(block)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def test_readme_has_the_blocks_and_words_that_are_tested():
    assert len(BLOCKS) == 2
    assert len(re.findall(r"^(?:python|torchrun|CHECKPOINT=)", BLOCKS[0], flags=re.MULTILINE)) == 6
    missing = [word for word in SMALLER if word not in "".join(BLOCKS)]
    assert not missing


@pytest.mark.slow
def test_six_commands_from_jsonl_to_heatmap(workplace, warm_python):
    run(BLOCKS[0], workplace, warm_python)
    for result in (
        "data/mix/manifest.json",
        "ckpt/128k/iter_0000002",
        "results/loss.json",
        "results/loss.png",
        "results/needle/needle.json",
        "results/needle/needle.png",
        "Llama-3-8B-128k/config.json",
    ):
        assert (workplace / result).exists(), result
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(workplace / "Llama-3-8B-128k")
    assert exported.config.max_position_embeddings >= 512


@pytest.mark.slow
def test_training_commands(workplace, warm_python):
    if not (workplace / "ckpt" / "base").exists():
        run(BLOCKS[0], workplace, warm_python)
    run(BLOCKS[1], workplace, warm_python)
    assert (workplace / "ckpt/mine/iter_0000002").exists()


def test_files_that_readme_links_to_are_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 5
    assert not [link for link in links if not (REPOSITORY / link).exists()]


def test_make_targets_that_readme_names_are_there():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert f"\n{target}:" in makefile
