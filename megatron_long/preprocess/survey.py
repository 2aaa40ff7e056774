"""A look at a sample of the corpus, to set the limits of what is tokenized and to tell a plan beforehand.

The sample is random, but the same for every run with the same files and seed (`corpus.blocks`).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from megatron_long.corpus.blocks import Block, sample_blocks
from megatron_long.corpus.inputs import LINES, InputFile, suffix_of
from megatron_long.errors import ConfigError
from megatron_long.mixture.admission import Admission, Limits, measured_share
from megatron_long.mixture.corpus_stats import Group, SourceStats, gather_stats
from megatron_long.mixture.estimates.block_estimates import CorpusEstimate
from megatron_long.mixture.estimates.intervals import Z
from megatron_long.mixture.mixture import Mixture, source_shares
from megatron_long.mixture.rows import read_strata
from megatron_long.mixture.shares import NATURAL_ERROR, format_token_count, keep_ratio, split_budget
from megatron_long.preprocess.monitor import EXPECTED_FILE
from megatron_long.preprocess.tokenize_file import TokenizeOptions, measure_file
from megatron_long.preprocess.workdir import write_json, write_limits
from megatron_long.tokenizer.tokenizer_types import Tokenizer

SURVEY_TEXT_BYTES = 32 << 20
SURVEY_FROM_BYTES = 64 << 20
"""Corpora with smaller files in all are tokenized without a survey."""
MARGIN = 1.5
"""How many times more than the estimate of what is needed is admitted."""
MIN_DOCUMENTS = 200
"""A source with fewer tokenized documents in the sample is admitted whole: its estimate is too rough."""
READ_FACTOR = 8
"""How many times more text is read, and counted by source and size, than is tokenized."""
COUNTED_FIRST = 8
"""One in so many blocks is counted beforehand, to set how many documents of each source are tokenized."""
FEW_DOCUMENTS = 50
"""Sources with fewer tokenized documents in a sample get more of theirs tokenized."""
COUNT_ONLY = Limits(order=0.0, keep_short=0.0, valid=0.0)
MIN_DEVIATION = 0.05
"""Relative deviation of documents from the ratio that is allowed for at least."""
REPORT_ERROR = 0.05
"""As NATURAL_ERROR, where shares are given: it is only reported."""

MOST_TEXT_BYTES = {
    lines + end: most for lines in LINES for end, most in (("", 1), (".gz", 1032), (".zst", 2**15))
}
"""Most bytes of text for each byte of a file: JSON's escapes are longer than what they stand for; DEFLATE's
shortest code has 2 bits for 258 bytes; Zstandard's smallest block has 4 bytes for 128 KiB."""


def check_budget(files: Sequence[InputFile], options: TokenizeOptions, mixture: Mixture) -> None:
    """Refuse a budget without room for a document, or that the sizes of the files prove too large.

    A token stands for at least one byte of text (`tokenizer.length_bound`), special tokens in a text are text
    too, and what is added to it (a space, BOS, EOD) is less than its line holds besides.

    Raises: ConfigError: a token of text does not fit, or no text of these files has so many tokens.
    """
    least = options.overhead + 1
    if mixture.train_tokens < least:
        around = "BOS and EOD" if options.overhead == 2 else "EOD"
        raise ConfigError(
            f"--train-tokens {mixture.train_tokens} has no room for a document, which is {around} and a "
            f"token of text at least; give {least} or more"
        )
    most_of = [MOST_TEXT_BYTES.get(suffix_of(file.path)) for file in files]
    found = [file.size_bytes * most for file, most in zip(files, most_of, strict=True) if most]
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
    """Leave the limits of the first round in the work folder: by a survey if the corpus is large.

    Args:
        files: Files of the corpus, or pieces of them.
    """
    if any(work.glob("admission.*")):
        return
    admission = options.admission
    if sum(file.read_bytes for file in files) > SURVEY_FROM_BYTES:
        survey = survey_corpus(files, tokenizer, options, SURVEY_TEXT_BYTES)
        admission = admit(survey, mixture)
        write_json(work / EXPECTED_FILE, expected_tokens(survey, admission))
    write_limits(work, 0, admission)


def survey_corpus(
    files: Sequence[InputFile], tokenizer: Tokenizer, options: TokenizeOptions, text_bytes: int
) -> CorpusEstimate:
    """Count the documents of a sample of blocks, and tokenize about `text_bytes` of them.

    Bad documents are counted and left out, and every source is allowed: a sample refuses nothing.
    """
    whole = [file for file in files if file.first_line == 1 and file.share[0] == 0]
    whole = [
        dataclasses.replace(file, piece_bytes=None, groups=None, share=(0, 1)) for file in whole
    ]
    sample = sample_blocks(whole, READ_FACTOR * text_bytes, options.seed)
    options = dataclasses.replace(options, skip_bad=True, sources_allowed=None)

    def measure(block: Block, admission: Admission) -> dict[str, Any]:
        mine = dataclasses.replace(
            options, admission=admission, max_text_bytes=block.max_text_bytes
        )
        return measure_file(block.item, tokenizer, mine)

    if sum(block.text_bytes for block in sample.blocks) <= text_bytes:
        return CorpusEstimate(sample, [measure(block, Admission()) for block in sample.blocks])
    counted = Admission(default=COUNT_ONLY)
    first = [measure(block, counted) for block in sample.blocks[::COUNTED_FIRST]]
    admission = _measures(first, text_bytes)
    infos = [measure(block, admission) for block in sample.blocks]
    more = _more_measured(infos, admission)
    if more:
        admission = admission.widened(more)
        for place, block in enumerate(sample.blocks):
            if more.keys() & set(infos[place]["sources"]):
                infos[place] = measure(block, admission)
    return CorpusEstimate(sample, infos)


def _more_measured(infos: Sequence[Mapping[str, Any]], admission: Admission) -> dict[str, Limits]:
    """Return new limits of the sources of which too few documents were tokenized to tell an error."""
    documents: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for info in infos:
        for stratum, counts in read_strata(info):
            documents[info["sources"][stratum.source]][stratum.size_bucket] += counts.documents
    more = {}
    for name, stats in gather_stats(infos).sources.items():
        if stats.documents_tokenized < min(FEW_DOCUMENTS, stats.documents):
            limits = admission.limits(name)
            measure = _solve(partial(_tokenized, documents[name]), 2 * FEW_DOCUMENTS)
            more[name] = dataclasses.replace(limits, measure=max(measure, limits.measure))
    return more


def _tokenized(amounts: Mapping[int, float], measure: float) -> float:
    """Return how much of amounts, by size, is tokenized on average."""
    return sum(amount * float(measured_share(measure, key)) for key, amount in amounts.items())


def _measures(infos: Sequence[Mapping[str, Any]], text_bytes: int) -> Admission:
    """Set how many documents of each source of a sample are tokenized, from a part of its blocks.

    A source gets text by the root of its size: all errors, also those of small ones, should be small.
    What a source has little of is tokenized whole, as is every source that these blocks lack.
    """
    sizes: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for info in infos:
        for stratum, counts in read_strata(info):
            name = info["sources"][stratum.source]
            sizes[name][stratum.size_bucket] += COUNTED_FIRST * counts.size_bytes
    roots = {name: sum(found.values()) ** 0.5 for name, found in sizes.items()}
    limits = {}
    for name, found in sizes.items():
        share = text_bytes * roots[name] / sum(roots.values())
        measure = _solve(partial(_tokenized, found), share)
        limits[name] = dataclasses.replace(COUNT_ONLY, measure=measure)
    return Admission(limits, dataclasses.replace(COUNT_ONLY, measure=1.0))


def _solve(rises: Callable[[float], float], value: float) -> float:
    """Return where a function of [0, 1] reaches a value, or 1 if it does not."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < value else (low, middle)
    return high


def everything(keep_short: float | None) -> Admission:
    """Admit all but the short documents that are known to be dropped."""
    return Admission(default=Limits(keep_short=1.0 if keep_short is None else keep_short))


def admit(survey: CorpusEstimate, mixture: Mixture) -> Admission:
    """Set the limits of each source so that about MARGIN times what is needed is tokenized."""
    sources = {name: stats for name, stats in survey.stats.sources.items() if stats.tokens}
    whole = {name: stats.tokens for name, stats in sources.items()}
    admitted = everything(mixture.keep_short)
    try:
        budgets = split_budget(mixture.train_tokens, source_shares(mixture, whole))
    except ConfigError:
        return admitted  # the sample may lack a source that the corpus has
    aim = NATURAL_ERROR if mixture.is_natural else REPORT_ERROR
    if not mixture.rules.is_pooled:
        limits = {
            name: _limits(stats, budgets[name], mixture)
            for name, stats in sources.items()
            if stats.documents_tokenized >= MIN_DOCUMENTS
        }
    else:
        pool = SourceStats(
            documents_tokenized=sum(stats.documents_tokenized for stats in sources.values()),
            tokens=sum(whole.values()),
            long_tokens=sum(stats.long_tokens for stats in sources.values()),
        )
        if pool.documents_tokenized < MIN_DOCUMENTS:
            return admitted
        shared = _limits(pool, mixture.train_tokens, mixture)
        valid = {name: _limits(stats, 0, mixture).valid for name, stats in sources.items()}
        # The pool is used up in one order, so every source needs the same limit, also one not seen here.
        order = max(shared.order, *valid.values())
        limits = {name: Limits(order, shared.keep_short, share) for name, share in valid.items()}
        admitted = Admission(default=Limits(order, shared.keep_short, order))
    limits = {
        name: dataclasses.replace(mine, measure=solve_measure(sources[name], mine, aim))
        for name, mine in limits.items()
    }
    return Admission(limits, admitted.default)


def solve_measure(stats: SourceStats, limits: Limits, aim: float) -> float:
    """Return how many documents must be measured for a source's share to have the error `aim`.

    The error of a share is at most root two times that of the tokens of a source, if it is the same for
    all sources; the sample may show documents more alike than they are, so it gets a margin too.
    """
    allowed = (aim * stats.tokens / Z) ** 2 / (2 * MARGIN)

    def minus_variance(value: float) -> float:
        measured = dataclasses.replace(limits, measure=value)
        return -sum(_planned_variance(group, measured) for group in stats.groups)

    return _solve(minus_variance, -allowed)


def _planned_variance(group: Group, limits: Limits) -> float:
    """Return the variance of a group's tokens in a run with these limits."""
    if not group.documents_tokenized:
        return 0.0
    share = min(_tokenized_share(key, limits) for key in group.keys)
    relative = group.squared_residuals(1.0, 0.0) / max(group.moments[1], 1.0)
    return (1 / max(share, 1e-9) - 1) * max(relative, MIN_DEVIATION**2) * group.tokens_squared


def _tokenized_share(key: tuple[int, int], limits: Limits) -> float:
    """Return the share of the documents of a stratum that a run with these limits tokenizes."""
    size_bucket, may_be_long = key
    needed = limits.order if may_be_long else limits.order * limits.keep_short
    return max(needed, limits.valid, float(measured_share(limits.measure, size_bucket)))


def expected_tokens(survey: CorpusEstimate, admission: Admission) -> dict[str, int]:
    """Estimate how many tokens of each source will be made."""
    expected = {}
    for name, stats in survey.stats.sources.items():
        limits, tokens = admission.limits(name), 0.0
        for group in stats.groups:
            share = sum(_tokenized_share(key, limits) for key in group.keys) / len(group.keys)
            tokens += share * group.rate * group.size_bytes
        expected[name] = round(tokens)
    return expected


def _limits(stats: SourceStats, budget: int, mixture: Mixture) -> Limits:
    """Set the limits of one source, from an estimate of the whole corpus."""
    long_share, tokens = stats.long_share, stats.tokens
    keep_short = mixture.keep_short
    if keep_short is None:
        solved = keep_ratio(long_share, mixture.long_token_share or 0.0)
        keep_short = min(MARGIN * solved, 1.0) if long_share else 1.0
        supply = tokens * (long_share + (1 - long_share) * keep_short / MARGIN)
    else:
        supply = tokens * (long_share + (1 - long_share) * keep_short)
    plain = mixture.short_share * budget
    valid = min(MARGIN * (2 * mixture.valid_tokens_per_source + plain) / tokens, 1.0)
    order = min(MARGIN * (budget - plain) / max(supply, 1.0) + valid, 1.0)
    return Limits(order, keep_short, valid)
