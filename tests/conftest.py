"""Small real things that tests share: a tokenizer, a mixed dataset, a way to start jobs."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.warm_jobs import REPOSITORY, WarmJobs

pytest_plugins = ["tests.corpus_fixtures", "tests.job_fixtures"]

WORDS = (
    "context window model token layer head query key value stretch long short book code paper page "
    "train batch step loss depth needle source share document mixture sequence parallel shard rank"
).split()


def make_text(generator: random.Random, num_words: int) -> str:
    """Sentences with some structure to learn: words follow each other in a fixed order, with jumps."""
    words, position = [], generator.randrange(len(WORDS))
    for _ in range(num_words):
        jump = generator.randrange(len(WORDS)) if generator.random() < 0.2 else 1
        position = (position + jump) % len(WORDS)
        words.append(WORDS[position])
    sentences = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
    return ". ".join(sentences) + "."


def write_corpus(path: Path, num_documents: int = 120, seed: int = 0) -> Path:
    """A jsonl corpus of two sources with short and long documents."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_documents):
            source = ("RedPajamaBook", "RedPajamaGithub")[i % 2]
            text = make_text(generator, generator.choice((20, 60, 300)))
            record = {"text": text, "meta": {"redpajama_set_name": source}}
            file.write(json.dumps(record) + "\n")
    return path


def write_tiny_llama(folder: Path, tokenizer: Path) -> None:
    """A Hugging Face folder: two layers of random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`guard_checkpoints`, undone afterwards."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_long.pickles import guard_checkpoints

    monkeypatch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    guard_checkpoints()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test, or a job of one that ran within it, sets in the environment reaches no other test."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of two sources."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A SentencePiece model of 384 pieces with byte fallback."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_dataset(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path
) -> Path:
    """A mixed dataset folder, as tools/preprocess_mix.py makes it."""
    from megatron_long.mixture.mixture import Mixture
    from megatron_long.preprocess.preprocess import preprocess
    from megatron_long.preprocess.preprocess_config import PreprocessConfig

    output = tmp_path_factory.mktemp("dataset") / "data"
    mixture = Mixture(
        train_tokens=16_000,
        long_threshold_tokens=128,
        short_keep_ratio=0.5,
        valid_tokens_per_source=1500,
        allow_repeat=10,
    )
    config = PreprocessConfig(inputs=[tiny_corpus], tokenizer=tiny_tokenizer, mixture=mixture)
    preprocess(config, output)
    return output


@pytest.fixture(scope="session")
def make_dataset(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path
) -> Callable[[Sequence[int]], Path]:
    """Write a dataset of random documents with these lengths, each ending in EOD: `make_dataset([5, 1])`."""
    import numpy as np

    from megatron_long.dataset.indexed import IndexedDatasetWriter
    from megatron_long.dataset.manifest import read_manifest, write_manifest
    from megatron_long.hashing import hash_file

    def make(lengths: Sequence[int]) -> Path:
        folder = tmp_path_factory.mktemp("documents") / "data"
        shutil.copytree(tiny_dataset, folder)
        manifest = read_manifest(tiny_dataset)
        generator = np.random.default_rng(0)
        for name in ("train.bin", "train.idx"):
            (folder / name).unlink()
        with IndexedDatasetWriter(folder / "train", "<u2") as writer:
            for length in lengths:
                tokens = generator.integers(3, 300, length)
                tokens[-1] = manifest.tokenizer.eod_id
                writer.add_document(tokens)
            writer.finalize()
        files = {name: hash_file(folder / name) for name in manifest.train.files}
        train = replace(manifest.train, num_tokens=sum(lengths), files=files)
        write_manifest(folder, replace(manifest, train=train))
        return folder

    return make


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal() -> None:
    """Programs under test get signals as in a terminal, also under nohup or behind `&`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def warm_jobs(tmp_path_factory: pytest.TempPathFactory, warm_python: Path) -> Iterator[WarmJobs]:
    """A server that has imported torch, Megatron and transformers, for machines without CUDA."""
    server = WarmJobs(tmp_path_factory.mktemp("warm"), warm_python)
    yield server
    server.close()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `python` that starts programs without their imports, for whole scripts (`warm_python.py`)."""
    folder = tmp_path_factory.mktemp("python")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, Path(__file__).with_name("warm_python.py"), folder]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    yield folder / "python"
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="session")
def run_job(warm_jobs: WarmJobs) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a Python program on this many processes and wait: `run_job(2, ["-m", "pkg", ...])`.

    Without CUDA they are forked from a process with all imports done, and with the host backend in place;
    `fresh=True` starts interpreters of their own, through torchrun, for what this would hide.
    """

    def run(
        num_processes: int,
        command: Sequence[object],
        *,
        check: bool = True,
        timeout: int = 300,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if fresh or has_cuda():
            result = run_fresh(num_processes, words, environment, timeout)
        else:
            result = warm_jobs.run(num_processes, words, environment, timeout)
        if check and result.returncode:
            output = (result.stdout + result.stderr)[-6000:]
            raise AssertionError(f"exit status {result.returncode} of {words}:\n{output}")
        return result

    return run


@functools.cache
def has_cuda() -> bool:
    """Whether programs would use a GPU, which a fork of a process cannot share."""
    import torch

    return torch.cuda.is_available()


def run_fresh(
    num_processes: int, words: Sequence[str], environment: dict[str, str], timeout: int
) -> subprocess.CompletedProcess[str]:
    """Run a program in interpreters of its own, through torchrun where there are several."""
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(num_processes)]
    return subprocess.run(
        [*launcher, *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
