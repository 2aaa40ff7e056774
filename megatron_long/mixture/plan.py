"""The plan of a dataset from the output of the first stage: which documents are taken, in which order.

Everything that grows with the corpus is on disk; arrays in memory hold a chunk of rows at a time.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_long.dataset.manifest import OrderInfo, SourceInfo
from megatron_long.errors import DataError
from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.corpus_stats import CorpusStats, gather_stats, read_info
from megatron_long.mixture.external_sort import iterate_rows, sort_on_disk
from megatron_long.mixture.mixture import Mixture, source_shares
from megatron_long.mixture.ordering import measure_evenness, order_documents
from megatron_long.mixture.rows import ROW_DTYPE, ROWS_FILE
from megatron_long.mixture.selection import (
    CHOSEN_DTYPE,
    SHARE_TOLERANCE,
    Cut,
    Group,
    choose_valid,
    count_apart,
    fill_plain,
    fill_upsampled,
    measure,
    measure_long_share,
    solve_keep_short,
    take_plain,
)
from megatron_long.mixture.shares import NATURAL_ERROR, split_budget
from megatron_long.mixture.summary import SourceCounts, source_info
from megatron_long.mixture.supply import (
    find_short,
    held_tokens,
    leave_out_tiny,
    share_warning,
    stop_holding_out,
    too_little,
)

ORDER_NAME = "order"
POOL = "all sources"
WIDER = 1.5
LEAST_LIMIT = 1e-6
"""A limit of 0 is widened from here."""


class TooTight(Exception):
    """The limits excluded documents that are needed; `wider` are the limits of another round."""

    def __init__(self, wider: dict[str, Limits]) -> None:
        super().__init__(", ".join(wider))
        self.wider = wider


@dataclass(frozen=True)
class Plan:
    """The documents of a dataset."""

    names: list[str]
    """The sources, by their index."""
    order: NDArray
    """CHOSEN_DTYPE, memory mapped: the training documents in their order."""
    valid: dict[str, NDArray]
    """ROW_DTYPE: held-out documents of each source, by file and line."""
    sources: dict[str, SourceInfo]
    stats: CorpusStats
    evenness: OrderInfo
    warnings: list[str] = field(default_factory=list)


def make_plan(
    folders: Sequence[Path],
    mixture: Mixture,
    admission: Admission,
    overhead: int,
    scratch: Path,
) -> Plan:
    """Choose and order the documents of a dataset.

    Args:
        folders: Output of the first stage for each file of the corpus.
        overhead: BOS and EOD of a document.
        scratch: Folder for files of the plan; it must exist.
    Raises: TooTight: another round is needed. DataError: a source cannot fill its budget. ConfigError: the
        shares do not fit the corpus.
    """
    stats = gather_stats(read_info(folder) for folder in folders)
    if not any(source.tokens for source in stats.sources.values()):
        raise DataError(
            f"--input holds no text ({len(folders)} files read); give files with documents, and "
            "check --text-key"
        )
    names = list(stats.sources)
    shares = source_shares(mixture, {name: stats.sources[name].tokens for name in names})
    is_pooled = mixture.rules.is_pooled
    pools = {POOL: 1.0} if is_pooled else shares
    rows = _sorted_rows(folders, names, len(pools), scratch / "corpus.rows")
    cut = Cut(overhead)
    if mixture.rules.cuts:
        cut = Cut(overhead, mixture.cut_length_tokens - overhead)
    groups = [
        Group(names if is_pooled else [name], mine, 0, mixture.long_threshold_tokens, cut)
        for name, mine in zip(pools, rows, strict=True)
    ]
    valid = _hold_out(groups, stats, admission, mixture.valid_tokens_per_source)
    warnings = _fill_budgets(groups, pools, mixture, admission, stats)
    for name in set(valid) & {group.names[0] for group in groups if not len(group.held_out)}:
        del valid[name]
    order, used, plain = _choose_and_order(groups, len(names), mixture, scratch)
    counts = [SourceCounts() for _ in names]
    for chunk in iterate_rows(order):
        for index, count in enumerate(counts):
            count.add(chunk[chunk["source"] == index], mixture.long_threshold_tokens)
    kept = [count.tokens for count in counts]
    errors, infos = stats.share_errors(), {}
    if mixture.is_natural:
        warnings += _rough_shares(shares, errors)
    for index, name in enumerate(names):
        group = next(group for group in groups if name in group.names)
        asked = kept[index] / mixture.train_tokens if is_pooled else shares[name]
        infos[name] = source_info(
            index,
            stats.sources[name],
            counts[index],
            valid.get(name, np.zeros(0, ROW_DTYPE)),
            asked,
            kept[index] / mixture.train_tokens,
            group.keep_short,
            used[index],
            errors[name],
            plain[index],
        )
    for group in groups:
        mine = [counts[at].without(plain[at]) for at in map(names.index, group.names)]
        warnings += share_warning(group, mine, stats, mixture)
    evenness = measure_evenness(iterate_rows(order), kept)
    return Plan(names, order, valid, infos, stats, evenness, warnings)


def _rough_shares(shares: Mapping[str, float], errors: Mapping[str, float]) -> Iterator[str]:
    """Tell of natural shares that are less well known than they should be."""
    for name, share in shares.items():
        if share and errors[name] > NATURAL_ERROR * share:
            yield (
                f"{name}: its natural share of {share:.3%} may be off by {errors[name]:.3%} (95%): "
                "its documents differ more than the survey showed; --source-shares sets it exactly"
            )


def _sorted_rows(
    folders: Sequence[Path], names: list[str], num_groups: int, path: Path
) -> list[NDArray]:
    """Sort the rows of all files by key into `path`; return those of each source, or of all as one group."""

    def chunks() -> Iterator[NDArray]:
        for folder in folders:
            found = read_info(folder)["sources"]
            index = np.array([names.index(name) for name in found], "<u2")
            rows = np.fromfile(folder / ROWS_FILE, ROW_DTYPE)
            rows["source"] = index[rows["source"]] if len(rows) else 0
            if len(rows):
                yield rows

    def groups_and_keys(chunk: NDArray) -> tuple[NDArray, NDArray[np.uint64]]:
        groups = np.minimum(chunk["source"].astype(np.int64), num_groups - 1)
        return groups, chunk["order_key"].astype(np.uint64)

    rows, bounds = sort_on_disk(chunks, path, ROW_DTYPE, num_groups, groups_and_keys)
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


def _hold_out(
    groups: Sequence[Group], stats: CorpusStats, admission: Admission, target_tokens: int
) -> dict[str, NDArray]:
    """Choose the held-out documents of each group; give those of each source, by file and line."""
    names = list(stats.sources)
    valid: dict[str, NDArray] = {}
    wider: dict[str, Limits] = {}
    for group in groups:
        limits = {name: admission.limits(name) for name in group.names}
        sources = {
            names.index(name): (stats.sources[name].tokens, limit.valid)
            for name, limit in limits.items()
        }
        group.held_out = choose_valid(group.rows, sources, target_tokens)
        held = np.array(group.rows[group.held_out])
        for name, limit in limits.items():
            mine = held[held["source"] == names.index(name)]
            if len(mine):
                valid[name] = np.sort(mine, order=["file", "line"])
            held_tokens = int(mine["length_tokens"].astype(np.int64).sum())
            if held_tokens < target_tokens and limit.valid < 1:
                share = min(4 * limit.valid, 1.0)
                order = max(limit.order, share)
                wider[name] = dataclasses.replace(limit, order=order, valid=share)
    if wider:
        raise TooTight(wider)
    return valid


def _fill_budgets(
    groups: Sequence[Group],
    shares: dict[str, float],
    mixture: Mixture,
    admission: Admission,
    stats: CorpusStats,
) -> list[str]:
    """Settle what each group takes; return warnings.

    A source that is too small to hold documents out holds none out, and with natural shares tiny sources that
    cannot fill their budgets are left out (their shares become 0): one document does not decide about a
    corpus.
    """
    warnings: list[str] = []
    while True:
        plain = split_budget(mixture.plain_tokens, shares)
        upsampled = split_budget(mixture.train_tokens - mixture.plain_tokens, shares)
        for name, group in zip(shares, groups, strict=True):
            group.budget, group.plain_budget = upsampled[name], plain[name]
        tokens = _settle(groups, mixture, admission, stats)
        available = dict(zip(shares, tokens, strict=True))
        asked = {name: group.budget for name, group in zip(shares, groups, strict=True)}
        short = find_short(asked, available, mixture.allow_repeat)
        for name, group in zip(shares, groups, strict=True):
            if (taken := take_plain(group, 1.0)) < group.plain_budget:
                short[name] = taken, group.plain_budget
        if not short:
            return warnings
        found = []
        if not mixture.rules.is_pooled:
            found = [
                stop_holding_out(group, stats, mixture.allow_repeat)
                for name, group in zip(shares, groups, strict=True)
                if name in short
            ]
        more = [warning for warning in found if warning]
        if not more and mixture.is_natural:
            more = leave_out_tiny(shares, short, stats)
        if not more and mixture.is_natural:
            rough = [name for name, source in stats.sources.items() if not source.is_exact]
            if rough:  # estimates of the shares do not tell whether they can be filled
                raise TooTight(dict.fromkeys(rough, Limits()))
        if not more:
            whole = {
                name: sum(stats.sources[source].tokens for source in group.names)
                - held_tokens(group)
                for name, group in zip(shares, groups, strict=True)
            }
            raise too_little(mixture, shares, available, short, whole)
        warnings += more


def _settle(
    groups: Sequence[Group], mixture: Mixture, admission: Admission, stats: CorpusStats
) -> list[int]:
    """Determine which documents each group takes; return the tokens that each could take in one pass."""
    wider: dict[str, Limits] = {}
    available: list[int] = []
    given, target = mixture.keep_short, mixture.long_token_share
    for group in groups:
        limits = admission.limits(group.names[0])
        if limits.valid == 1:  # every document was tokenized, whatever the other limits
            limits = Limits()
        group.long_budget, group.trimmed = None, {}
        plain = take_plain(group, limits.valid)
        if plain < group.plain_budget and limits.valid < 1:
            wider |= dict.fromkeys(group.names, _widen_plain(limits, plain, group.plain_budget))
            continue
        if given is None:
            needed = group.budget / mixture.allow_repeat
            group.keep_short = solve_keep_short(group, target or 0.0, needed, limits.keep_short)
        else:
            group.keep_short = given
        got = measure(group, group.keep_short)
        available.append(got.tokens)
        # No second pass before all documents are known.
        passes = mixture.allow_repeat if limits.order == 1 else 1
        fills = got.tokens * passes >= group.budget
        needs_order = not fills and limits.order < 1
        # A ratio above the limit is that of another command, which continues this work.
        needs_short = limits.keep_short < (given or 0.0)
        needs_short |= given is None and group.keep_short >= limits.keep_short < 1
        if target is not None and group.budget and fills and not needs_short:
            needs_order = not _meet_long_share(group, mixture, limits, _long_share(group, stats))
            needs_short = needs_order and limits.keep_short < 1
        if needs_order or needs_short:
            keep_short = max(2 * limits.keep_short, given or 0.0) if needs_short else 0.0
            wider |= dict.fromkeys(
                group.names, _widen(limits, got.tokens, group.budget, keep_short)
            )
    if wider:
        raise TooTight(wider)
    return available


def _meet_long_share(
    group: Group, mixture: Mixture, limits: Limits, share_in_corpus: float
) -> bool:
    """Count long and short documents apart where one order of all misses the share and this meets it.

    A group whose corpus is above the share may stay above it: long documents are not dropped for short ones.

    Returns: False if wider limits may let more be met.
    """
    target = mixture.long_token_share
    assert target is not None
    off = measure_long_share(group) - target
    if abs(off) <= SHARE_TOLERANCE or (off > 0 and share_in_corpus >= target):
        return True
    is_open = min(limits.order, limits.keep_short) == 1
    passes = mixture.allow_repeat if is_open else 1
    return count_apart(group, target, limits.keep_short, passes) or is_open


def _long_share(group: Group, stats: CorpusStats) -> float:
    """Return the share of long documents in the corpus of a group."""
    sources = [stats.sources[name] for name in group.names]
    return sum(source.long_tokens for source in sources) / sum(source.tokens for source in sources)


def _widen(limits: Limits, tokens: int, budget: int, keep_short: float) -> Limits:
    order = min(limits.order * max(WIDER * budget / max(tokens, 1), WIDER), 1.0)
    keep_short = min(max(keep_short, limits.keep_short), 1.0)
    valid = min(limits.valid, order)
    return dataclasses.replace(limits, order=order, keep_short=keep_short, valid=valid)


def _widen_plain(limits: Limits, tokens: int, budget: int) -> Limits:
    factor = max(WIDER * budget / max(tokens, 1), WIDER)
    valid = min(max(limits.valid, LEAST_LIMIT) * factor, 1.0)
    return dataclasses.replace(limits, order=max(limits.order, valid), valid=valid)


def _choose_and_order(
    groups: Sequence[Group], num_sources: int, mixture: Mixture, scratch: Path
) -> tuple[NDArray, list[int], list[SourceCounts]]:
    """Return the training documents in order, and of each source how many there are and those as they are."""
    path, num_passes, num_rows = scratch / "chosen.rows", 1, 0
    used = np.zeros(num_sources, np.int64)
    plain = [SourceCounts() for _ in range(num_sources)]
    with open(path, "wb") as file:
        for group in groups:
            parts = zip(fill_plain(group), itertools.repeat(True), strict=False)
            others = zip(fill_upsampled(group), itertools.repeat(False), strict=False)
            for pieces, is_plain in itertools.chain(parts, others):
                file.write(pieces.tobytes())
                num_rows += len(pieces)
                for index, count in enumerate(plain if is_plain else ()):
                    count.add(pieces[pieces["source"] == index], mixture.long_threshold_tokens)
                # Pieces of a document are consecutive.
                places = pieces[["file", "line"]]
                is_first = np.append(True, places[1:] != places[:-1]) & (pieces["repeat"] == 0)
                used += np.bincount(pieces["source"][is_first], minlength=num_sources)
                num_passes = max(num_passes, int(pieces["repeat"][-1]) + 1)
    chosen = np.memmap(path, CHOSEN_DTYPE, "r", shape=(num_rows,))
    order = order_documents(chosen, num_sources, num_passes, scratch, ORDER_NAME)
    path.unlink()
    return order, used.tolist(), plain
