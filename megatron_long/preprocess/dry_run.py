"""What a run would make of a corpus, from a sample of it, without writing anything to keep."""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_long.corpus.blocks import expected_text
from megatron_long.corpus.corpus_sample import sample_texts
from megatron_long.corpus.inputs import InputFile
from megatron_long.corpus.listing import OnListing, describe_skipped, no_listing
from megatron_long.dataset.manifest import SourceInfo
from megatron_long.dataset.tables import short_count
from megatron_long.errors import ConfigError
from megatron_long.mixture.admission import Admission
from megatron_long.mixture.corpus_stats import CorpusStats
from megatron_long.mixture.estimates.block_estimates import CorpusEstimate
from megatron_long.mixture.estimates.forecast import SourceForecast, forecast
from megatron_long.mixture.estimates.intervals import Interval
from megatron_long.mixture.mixture import Mixture, named_sources
from megatron_long.mixture.plan import Plan, make_plan
from megatron_long.preprocess.preprocess_config import PreprocessConfig, tokenize_options
from megatron_long.preprocess.publish import disk_errors
from megatron_long.preprocess.survey import check_budget, survey_corpus
from megatron_long.preprocess.tokenize_file import TokenizeOptions, tokenize_file
from megatron_long.tokenizer.engines import check_sample
from megatron_long.tokenizer.loading import load_tokenizer, separate_documents
from megatron_long.tokenizer.tokenizer_types import Tokenizer

SAMPLE_TEXT_BYTES = 64 << 20
"""Text that is tokenized; more is read (`survey.READ_FACTOR`). A corpus of less is planned as a run does."""


@dataclass(frozen=True)
class DryRun:
    """What a run would make of each source: exact figures, or a forecast."""

    planned: dict[str, SourceInfo] = field(default_factory=dict)
    expected: dict[str, SourceForecast] = field(default_factory=dict)
    read_share: float = 1.0
    """Share of the corpus that was read, by bytes of its files."""
    is_whole: bool = True
    """Whether all of it was read."""
    notes: list[str] = field(default_factory=list)
    """What a run warns of; what the sample leaves open, and what a run may refuse."""


def plan_dataset(
    config: PreprocessConfig,
    text_bytes: int = SAMPLE_TEXT_BYTES,
    on_listing: OnListing = no_listing,
) -> DryRun:
    """Tell what `preprocess` would make of each source, writing nothing to keep.

    A small corpus is planned as a run does, and refused as a run refuses it; a large one is sampled, and
    what a run may refuse is a note.
    """
    listing = config.list_inputs()
    on_listing(listing)
    files, tokenizer = listing.files, load_tokenizer(config.tokenizer, config.engine)
    separate_documents(tokenizer, config.tokenizer, config.document_separator)
    options = tokenize_options(config, tokenizer)
    check_budget(files, options, config.mixture)
    if sum(map(expected_text, files)) <= text_bytes:
        tokenizer = check_sample(tokenizer, sample_texts(files, config.keys))
        plan = _plan_whole(files, tokenizer, options, config.mixture)
        notes = [*plan.warnings, *describe_skipped(listing.lost), *_bad_notes(plan.stats)]
        return DryRun(planned=plan.sources, notes=notes)
    estimate = survey_corpus(files, tokenizer, options, text_bytes)
    _check_named(estimate, config.mixture)
    mixture, unseen = _without_unseen(config.mixture, estimate)
    notes = [*_sample_notes(estimate, config), *_unseen_notes(unseen, config.mixture)]
    try:
        expected = forecast(estimate, mixture)
    except ConfigError as error:  # the sources that were not seen may have what it asks for
        notes.append(f"no table, because of the sources of the sample: {error}")
        return DryRun({}, {}, estimate.read_share, estimate.is_whole, notes)
    notes += _supply_notes(expected, config.mixture)
    return DryRun({}, expected, estimate.read_share, estimate.is_whole, notes)


HEADER = (
    "source",
    "docs in",
    "tokens in",
    "share in",
    "tokens asked",
    "tokens usable",
    "long before",
    "long after",
)


def expected_rows(found: DryRun) -> Iterator[list[str]]:
    """Yield the rows of the table of a forecast: each figure with its interval.

    `~` marks figures that are the same in all that was read: their error is not known to be zero.
    """
    unsure = "" if found.is_whole else "~"
    for name, source in found.expected.items():
        corpus, after = source.corpus, source.long_share_after
        yield [
            name,
            _count_text(corpus.documents, unsure),
            _count_text(corpus.tokens, unsure),
            _share_text(corpus.share, unsure),
            _count_text(source.tokens_asked),
            _count_text(source.tokens_usable, unsure),
            _share_text(corpus.long_share, unsure),
            _share_text(after, unsure) if after else "-",
        ]


def _count_text(interval: Interval, unsure: str = "") -> str:
    if interval.is_exact:
        return f"~{short_count(interval.value)}" if unsure else f"{interval.value:,.0f}"
    digits = 3
    while digits < 9 and short_count(interval.low, digits) == short_count(interval.high, digits):
        digits += 1
    numbers = (interval.value, interval.low, interval.high)
    value, low, high = (short_count(number, digits) for number in numbers)
    return f"{value} ({low}-{high})"


def _share_text(interval: Interval, unsure: str) -> str:
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{unsure}{value:.2f}%" if interval.is_exact else f"{value:.2f}% ({low:.2f}-{high:.2f})"


def _plan_whole(
    files: list[InputFile], tokenizer: Tokenizer, options: TokenizeOptions, mixture: Mixture
) -> Plan:
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        folder = Path(scratch)
        options = dataclasses.replace(options, admission=Admission())
        folders = [folder / f"{index:06d}" for index in range(len(files))]
        for index, file in enumerate(files):
            tokenize_file(file, index, tokenizer, options, folders[index])
        (folder / "plan").mkdir()
        return make_plan(folders, mixture, Admission(), options.overhead, folder / "plan")


def _bad_notes(stats: CorpusStats) -> Iterator[str]:
    if stats.documents_bad:
        first = stats.bad[0]
        yield (
            f"bad documents that are left out: {stats.documents_bad:,} (first: "
            f"{first['file']}:{first['line']} {first['reason']})"
        )


def _check_named(estimate: CorpusEstimate, mixture: Mixture) -> None:
    """Refuse what is certain: a source that the sample holds is in the corpus.

    Raises: ConfigError: it has no share.
    """
    allowed = named_sources(mixture)
    unnamed = [
        name for name in estimate.stats.sources if allowed is not None and name not in allowed
    ]
    if unnamed and allowed is not None:
        raise ConfigError(
            f"--source-shares gives no share to {', '.join(unnamed)} of the corpus (it names "
            f"{', '.join(sorted(allowed))}); give a YAML file with a share for each (0 excludes a source)"
        )


def _without_unseen(mixture: Mixture, estimate: CorpusEstimate) -> tuple[Mixture, list[str]]:
    """Leave out the sources that the command names and the sample lacks; give their names too."""
    seen = estimate.stats.sources
    allowed = named_sources(mixture) or frozenset()
    unseen = sorted((allowed | set(mixture.upsampled_shares)) - set(seen))
    kept = {name: share for name, share in mixture.upsampled_shares.items() if name in seen}
    changes: dict[str, object] = {"missing_sources": "drop"}
    if kept != mixture.upsampled_shares:
        changes |= {"upsampled_shares": kept}
        changes |= {} if kept else {"strategy": "original"}
    return dataclasses.replace(mixture, **changes), unseen  # type: ignore[arg-type]


def _sample_notes(estimate: CorpusEstimate, config: PreprocessConfig) -> Iterator[str]:
    stats, most = estimate.stats, estimate.most_unseen()
    if most:
        yield f"a source that is not listed has less than {most:.2%} of the bytes of the files (95%)"
    if estimate.unread_share > 0.0005:
        yield (
            f"{estimate.unread_share:.1%} of the corpus was not sampled, the rest of compressed files, which "
            "can only be read from their beginnings: the intervals take it to differ from the beginnings as "
            "these differ from file to file; in files that are sorted by length or source, it differs more"
        )
    if stats.documents_bad:
        first = stats.bad[0]
        what = "skips" if config.on_bad_document == "skip" else "stops at"
        yield (
            f"bad documents in the sample: {stats.documents_bad:,}, which a run {what} "
            f"(first: {first['file']}: {first['reason']})"
        )


def _unseen_notes(unseen: list[str], mixture: Mixture) -> Iterator[str]:
    if unseen:
        then = (
            "a run refuses them"
            if mixture.missing_sources == "error"
            else "a run drops their shares"
        )
        yield (
            f"{', '.join(unseen)}: named, but not in the sample; if the corpus lacks them, {then}, and if "
            "it has them, the others get less than the table says"
        )


def _supply_notes(expected: dict[str, SourceForecast], mixture: Mixture) -> Iterator[str]:
    """Say where the budget may be more than a source has: surely only if all documents are too few."""
    asked = {name: (s.tokens_asked.value, s.tokens_asked.high) for name, s in expected.items()}
    usable = {name: (s.tokens_usable.low, s.tokens_usable.high) for name, s in expected.items()}
    whole = {name: mixture.allow_repeat * s.corpus.tokens.high for name, s in expected.items()}
    if mixture.rules.is_pooled:  # the sources share a budget
        asked = {"the corpus": (mixture.train_tokens,) * 2}
        whole = {"the corpus": sum(whole.values())}
        usable = {
            "the corpus": (
                sum(low for low, _ in usable.values()),
                sum(high for _, high in usable.values()),
            )
        }
    for name, (value, most) in asked.items():
        low, high = usable[name]
        if most > low:
            yield _short(name, value, low, high, is_sure=value > whole[name])


def _short(name: str, asked: float, low: float, high: float, *, is_sure: bool) -> str:
    sure = "is refused" if is_sure else "may be refused"
    return (
        f"{name}: {asked:,.0f} tokens asked, {low:,.0f} to {high:,.0f} available after holding out "
        f"validation documents and dropping short ones: the run {sure}"
    )
