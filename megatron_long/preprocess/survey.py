"""A look at a sample of the corpus, to set the limits of what is tokenized and to tell a plan beforehand.

The sample is the beginning of files that lie evenly over the list of inputs, so it is the same for every run.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.corpus.inputs import InputFile
from megatron_long.errors import ConfigError
from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.corpus_stats import CorpusStats, SourceStats, gather_stats, read_info
from megatron_long.mixture.mixture import Mixture, source_budgets, source_shares
from megatron_long.preprocess.tokenize_file import TokenizeOptions, tokenize_file
from megatron_long.tokenizer.tokenizer_types import Tokenizer

SURVEY_FILES = 32
SURVEY_TEXT_BYTES = 32 << 20
SURVEY_FROM_BYTES = 64 << 20
"""Corpora with smaller files in all are tokenized without a survey."""
MARGIN = 1.5
"""How many times more than the estimate of what is needed is admitted."""
MIN_DOCUMENTS = 200
"""A source with fewer documents in the sample is admitted whole: its estimate would be too rough."""


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


def everything(mixture: Mixture) -> Admission:
    """Admit all but the short documents that are known to be dropped."""
    keep_short = 1.0 if mixture.keep_short is None else mixture.keep_short
    return Admission(default=Limits(keep_short=keep_short))


def admit(survey: Survey, mixture: Mixture) -> Admission:
    """Set the limits of each source so that about MARGIN times what is needed is tokenized."""
    sources = {name: stats for name, stats in survey.stats.sources.items() if stats.tokens}
    whole = {name: max(int(stats.tokens / survey.fraction), 1) for name, stats in sources.items()}
    try:
        budgets = source_budgets(mixture, source_shares(mixture, whole))
    except ConfigError:
        return everything(mixture)  # the sample may lack a source that the corpus has
    default = everything(mixture).default
    if mixture.rules.is_pooled:
        return _admit_pool(sources, whole, mixture, default)
    limits = {}
    for name, stats in sources.items():
        if stats.documents >= MIN_DOCUMENTS:
            limits[name] = _limits(stats, whole[name], budgets[name], mixture)
    return Admission(limits, default)


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


def _admit_pool(
    sources: Mapping[str, SourceStats], whole: Mapping[str, int], mixture: Mixture, default: Limits
) -> Admission:
    pool = SourceStats(
        documents=sum(stats.documents for stats in sources.values()),
        tokens=sum(stats.tokens for stats in sources.values()),
        long_tokens=sum(stats.long_tokens for stats in sources.values()),
    )
    if pool.documents < MIN_DOCUMENTS:
        return Admission(default=default)
    shared = _limits(pool, sum(whole.values()), mixture.train_tokens, mixture)
    limits = {}
    for name, stats in sources.items():
        mine = _limits(stats, whole[name], 0, mixture)
        order = max(shared.order, mine.order)
        limits[name] = Limits(order, shared.keep_short, min(max(mine.valid, 0.0), order))
    # The pool is used up in one order, so every source needs the same limit, also one not seen here.
    highest = max(limit.order for limit in limits.values())
    limits = {name: dataclasses.replace(limit, order=highest) for name, limit in limits.items()}
    return Admission(limits, Limits(highest, shared.keep_short, highest))


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
    if mixture.keep_short is not None:
        supply = tokens * (long_share + (1 - long_share) * keep_short)
    valid = min(2 * MARGIN * mixture.valid_tokens_per_source / tokens, 1.0)
    order = min(MARGIN * budget / max(supply, 1.0) + valid, 1.0)
    return Limits(order, keep_short, valid)
