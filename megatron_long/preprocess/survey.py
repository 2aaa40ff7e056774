"""A look at a sample of the corpus, to set the limits of what is tokenized and to tell a plan beforehand.

The sample is the beginning of files that lie evenly over the list of inputs, so it is the same for every run.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_long.corpus.inputs import InputFile
from megatron_long.errors import ConfigError
from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.corpus_stats import CorpusStats, SourceStats, gather_stats, read_info
from megatron_long.mixture.mixture import Mixture, source_shares
from megatron_long.mixture.shares import format_token_count, split_budget
from megatron_long.preprocess.monitor import EXPECTED_FILE
from megatron_long.preprocess.tokenize_file import TokenizeOptions, tokenize_file
from megatron_long.preprocess.workdir import write_json, write_limits
from megatron_long.tokenizer.engines import release_engine
from megatron_long.tokenizer.tokenizer_types import Tokenizer

SURVEY_FILES = 32
SURVEY_TEXT_BYTES = 32 << 20
SURVEY_FROM_BYTES = 64 << 20
"""Corpora with smaller files in all are tokenized without a survey."""
MARGIN = 1.5
"""How many times more than the estimate of what is needed is admitted."""
MIN_DOCUMENTS = 200
"""A source with fewer documents in the sample is admitted whole: its estimate would be too rough."""

MOST_TEXT_BYTES = {".jsonl": 1, ".jsonl.gz": 1032, ".jsonl.zst": 2**15}
"""Most bytes of text for each byte of a file: JSON's escapes are longer than what they stand for; DEFLATE's
shortest code has 2 bits for 258 bytes; Zstandard's smallest block has 4 bytes for 128 KiB."""


def refuse_too_many_tokens(
    files: Sequence[InputFile], options: TokenizeOptions, mixture: Mixture
) -> None:
    """Refuse a budget that the sizes of the files prove too large.

    A token stands for at least one byte of text (`tokenizer.length_bound`), special tokens in a text are text
    too, and what is added to it (a space, BOS, EOD) is less than its line holds besides.

    Raises: ConfigError: no text that these files can hold has so many tokens.
    """
    found = [
        file.size_bytes * most
        for file in files
        for suffix, most in MOST_TEXT_BYTES.items()
        if file.name.partition("#")[0].endswith(suffix)
    ]
    if options.extra_tokens is None or len(found) < len(files):
        return  # no bound is known
    size_bytes, pieces = sum(found), Fraction(1)
    if mixture.rules.cuts:
        pieces = Fraction(mixture.cut_length_tokens, mixture.cut_length_tokens - options.overhead)
    most = int(size_bytes * pieces * mixture.allow_repeat)
    if mixture.train_tokens > most > 0:  # files without a byte have an error of their own
        raise ConfigError(
            f"--train-tokens {format_token_count(mixture.train_tokens)} is more than the corpus can hold: "
            f"its files have at most {size_bytes:,} bytes of text, so at most {most:,} tokens "
            f"(--allow-repeat {mixture.allow_repeat}); give fewer: --dry-run estimates how many it has"
        )


def set_limits(
    work: Path,
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    mixture: Mixture,
) -> None:
    """Leave the limits of the first round in the work folder: by a survey if the corpus is large."""
    if any(work.glob("admission.*")):
        return
    admission = options.admission
    if sum(file.size_bytes for file in files) > SURVEY_FROM_BYTES:
        folder = work / "survey"
        shutil.rmtree(folder, ignore_errors=True)
        options = dataclasses.replace(options, skip_bad=True)
        survey = survey_corpus(files, tokenizer, options, folder)
        release_engine(tokenizer)
        admission = admit(survey, mixture)
        shutil.rmtree(folder)
        write_json(work / EXPECTED_FILE, expected_tokens(survey, admission))
    write_limits(work, 0, admission)


@dataclass(frozen=True)
class Survey:
    """What a sample says of the corpus."""

    stats: CorpusStats
    """Of the sample."""
    folders: list[Path]
    """What was made of each sampled file."""
    fraction: float
    """Share of the corpus, by bytes of its files, that the sample is."""


def survey_corpus(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    folder: Path,
    text_bytes: int = SURVEY_TEXT_BYTES,
) -> Survey:
    """Tokenize a sample into `folder`, everything admitted; a small corpus is its own sample."""
    count = min(len(files), SURVEY_FILES)
    bounds = [index * len(files) // count for index in range(count + 1)]
    total = sum(file.read_bytes for file in files)
    whole = count == len(files) and total <= text_bytes // 4
    folders = []
    for index, end in itertools.pairwise(bounds):
        # Each file stands for those up to the next, and the same share is read of all: a corpus may have
        # one file a source, of any sizes.
        stands_for = sum(file.read_bytes for file in files[index:end])
        limit = None if whole else max(-(-text_bytes * stands_for // max(total, 1)), 1)
        mine = dataclasses.replace(options, admission=Admission(), max_text_bytes=limit)
        folders.append(folder / f"{index:06d}")
        tokenize_file(files[index], index, tokenizer, mine, folders[-1])
    infos = [read_info(path) for path in folders]
    read = sum(info["read_bytes"] for info in infos)
    return Survey(gather_stats(infos), folders, min(read / total, 1.0) if total else 1.0)


def everything(keep_short: float | None) -> Admission:
    """Admit all but the short documents that are known to be dropped."""
    return Admission(default=Limits(keep_short=1.0 if keep_short is None else keep_short))


def admit(survey: Survey, mixture: Mixture) -> Admission:
    """Set the limits of each source so that about MARGIN times what is needed is tokenized."""
    sources = {name: stats for name, stats in survey.stats.sources.items() if stats.tokens}
    whole = {name: max(int(stats.tokens / survey.fraction), 1) for name, stats in sources.items()}
    admitted = everything(mixture.keep_short)
    try:
        budgets = split_budget(mixture.train_tokens, source_shares(mixture, whole))
    except ConfigError:
        return admitted  # the sample may lack a source that the corpus has
    if not mixture.rules.is_pooled:
        limits = {
            name: _limits(stats, whole[name], budgets[name], mixture)
            for name, stats in sources.items()
            if stats.documents >= MIN_DOCUMENTS
        }
        return Admission(limits, admitted.default)
    pool = SourceStats(
        documents=sum(stats.documents for stats in sources.values()),
        tokens=sum(stats.tokens for stats in sources.values()),
        long_tokens=sum(stats.long_tokens for stats in sources.values()),
    )
    if pool.documents < MIN_DOCUMENTS:
        return admitted
    shared = _limits(pool, sum(whole.values()), mixture.train_tokens, mixture)
    valid = {name: _limits(stats, whole[name], 0, mixture).valid for name, stats in sources.items()}
    # The pool is used up in one order, so every source needs the same limit, also one not seen here.
    order = max(shared.order, *valid.values())
    limits = {name: Limits(order, shared.keep_short, share) for name, share in valid.items()}
    return Admission(limits, Limits(order, shared.keep_short, order))


def expected_tokens(survey: Survey, admission: Admission) -> dict[str, int]:
    """Estimate how many tokens of each source will be made."""
    expected = {}
    for name, stats in survey.stats.sources.items():
        limits = admission.limits(name)
        kept = stats.long_tokens + (stats.tokens - stats.long_tokens) * limits.keep_short
        expected[name] = round(
            max(kept * limits.order, stats.tokens * limits.valid) / survey.fraction
        )
    return expected


def _limits(stats: SourceStats, tokens: int, budget: int, mixture: Mixture) -> Limits:
    """Set the limits of one source.

    Args:
        stats: Of the sample.
        tokens: Estimate of the source in the whole corpus.
    """
    long_share = stats.long_tokens / stats.tokens
    keep_short = mixture.keep_short
    if keep_short is None:
        target = mixture.long_token_share or 0.0
        solved = long_share * (1 - target) / (target * max(1 - long_share, 1e-9))
        keep_short = min(MARGIN * solved, 1.0) if long_share else 1.0
        supply = tokens * (long_share + (1 - long_share) * keep_short / MARGIN)
    else:
        supply = tokens * (long_share + (1 - long_share) * keep_short)
    valid = min(2 * MARGIN * mixture.valid_tokens_per_source / tokens, 1.0)
    order = min(MARGIN * budget / max(supply, 1.0) + valid, 1.0)
    return Limits(order, keep_short, valid)
