"""The plan of a dataset from the output of the first stage: which documents are taken, in which order.

Everything that grows with the corpus is on disk; arrays in memory hold a chunk of rows at a time.
"""

import math
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
from megatron_long.mixture.mixture import Mixture, source_budgets, source_shares
from megatron_long.mixture.ordering import measure_evenness, order_documents
from megatron_long.mixture.rows import ROW_DTYPE, ROWS_FILE
from megatron_long.mixture.selection import (
    CHOSEN_DTYPE,
    SHARE_TOLERANCE,
    Group,
    choose_valid,
    fill_budget,
    measure,
    solve_keep_short,
)
from megatron_long.mixture.summary import SourceCounts, source_info

ORDER_NAME = "order"
WIDER = 1.5


class TooTight(Exception):
    """The limits excluded documents that are needed; `wider` are the limits of another round."""

    def __init__(self, wider: dict[str, Limits]) -> None:
        super().__init__(", ".join(wider))
        self.wider = wider


class TooLittle(DataError):
    """Sources cannot fill their budgets.

    Args:
            short: Tokens available and asked, of each such source.
        most: Training tokens that the corpus can fill; 0 where a source has nothing left.
        others: What else would help.
        fraction: Share of the corpus that all counts are of.
    """

    def __init__(
        self,
        train_tokens: int,
        short: Mapping[str, tuple[int, int]],
        most: int,
        others: Sequence[str],
        fraction: float = 1.0,
    ) -> None:
        self.counts = train_tokens, short, most, others
        listed = "; ".join(
            f"{name}: {round(usable / fraction):,} tokens available, {round(asked / fraction):,} asked"
            for name, (usable, asked) in short.items()
        )
        estimate = f"by an estimate from {fraction:.2%} of it, " if fraction < 1 else ""
        at_most = [f"at most --train-tokens {int(most / fraction)}"] if most else []
        *first, last = [*at_most, *others]
        super().__init__(
            f"--train-tokens {round(train_tokens / fraction)} is more than the corpus can fill after "
            f"holding out validation documents and dropping short ones ({estimate}{listed}); use "
            f"{', '.join(first)}{' or ' if first else ''}{last}"
        )


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
    budgets = source_budgets(mixture, shares)
    groups = _groups(folders, mixture, names, budgets, scratch)
    valid: dict[str, NDArray] = {}
    warnings: list[str] = []
    wider: dict[str, Limits] = {}
    for group in groups:
        limits = {names.index(name): _valid_limit(stats, admission, name) for name in group.names}
        group.held_out = choose_valid(group.rows, limits, mixture.valid_tokens_per_source)
        held = np.array(group.rows[group.held_out])
        for name in group.names:
            mine = held[held["source"] == names.index(name)]
            if len(mine):
                valid[name] = np.sort(mine, order=["file", "line"])
            held_tokens = int(mine["length_tokens"].astype(np.int64).sum())
            mine_limits = admission.limits(name)
            if held_tokens < mixture.valid_tokens_per_source and mine_limits.valid < 1:
                share = min(4 * mine_limits.valid, 1.0)
                reach = max(mine_limits.order, share)
                wider[name] = Limits(reach, mine_limits.keep_short, share)
    if wider:
        raise TooTight(wider)
    _settle(groups, mixture, admission, overhead, shares, warnings)
    order, used = _choose_and_order(groups, mixture, overhead, names, scratch)
    counts = [SourceCounts() for _ in names]
    for chunk in iterate_rows(order):
        for index, count in enumerate(counts):
            count.add(chunk[chunk["source"] == index], mixture.long_threshold_tokens)
    kept = [count.tokens for count in counts]
    infos = {}
    for index, name in enumerate(names):
        group = next(group for group in groups if name in group.names)
        asked = kept[index] / mixture.train_tokens if mixture.rules.is_pooled else shares[name]
        infos[name] = source_info(
            index,
            stats.sources[name],
            counts[index],
            valid.get(name, np.zeros(0, ROW_DTYPE)),
            asked,
            kept[index] / mixture.train_tokens,
            group.keep_short,
            used[index],
        )
    evenness = measure_evenness(iterate_rows(order), kept)
    return Plan(names, order, valid, infos, stats, evenness, warnings)


def _groups(
    folders: Sequence[Path],
    mixture: Mixture,
    names: list[str],
    budgets: Mapping[str, int],
    scratch: Path,
) -> list[Group]:
    """Sort the rows of all files by source and key, and assign them to budgets."""
    pooled = mixture.rules.is_pooled

    def chunks() -> Iterator[NDArray]:
        for folder in folders:
            found = read_info(folder)["sources"]
            index = np.array([names.index(name) for name in found], "<u2")
            rows = np.fromfile(folder / ROWS_FILE, ROW_DTYPE)
            rows["source"] = index[rows["source"]] if len(rows) else 0
            if len(rows):
                yield rows

    def groups_and_keys(chunk: NDArray) -> tuple[NDArray, NDArray[np.uint64]]:
        groups = np.zeros(len(chunk), np.int64) if pooled else chunk["source"].astype(np.int64)
        return groups, chunk["order_key"].astype(np.uint64)

    num_groups = 1 if pooled else len(names)
    rows, bounds = sort_on_disk(
        chunks, scratch / "corpus.rows", ROW_DTYPE, num_groups, groups_and_keys
    )
    if pooled:
        return [Group(names, rows, mixture.train_tokens)]
    return [
        Group([name], rows[bounds[index] : bounds[index + 1]], budgets[name])
        for index, name in enumerate(names)
    ]


def _valid_limit(stats: CorpusStats, admission: Admission, name: str) -> tuple[int, float]:
    return stats.sources[name].tokens, admission.limits(name).valid


def _settle(
    groups: Sequence[Group],
    mixture: Mixture,
    admission: Admission,
    overhead: int,
    shares: Mapping[str, float],
    warnings: list[str],
) -> None:
    """Determine how many short documents each group keeps, and check that it can fill its budget."""
    wider: dict[str, Limits] = {}
    available: dict[str, int] = {}
    for group in groups:
        limits = admission.limits(group.names[0])
        given = mixture.keep_short
        if given is None:
            group.keep_short = solve_keep_short(group, mixture, overhead, limits.keep_short)
        else:
            group.keep_short = given
        got = measure(group, mixture, overhead, group.keep_short)
        available["all sources" if mixture.rules.is_pooled else group.names[0]] = got.tokens
        target = mixture.long_token_share
        off = got.long_share - target if target is not None and group.budget else 0.0
        needs_order = got.tokens * mixture.allow_repeat < group.budget and limits.order < 1
        needs_short = given is None and group.keep_short >= limits.keep_short < 1
        if needs_order or needs_short:
            wider |= dict.fromkeys(
                group.names, _widen(limits, got.tokens, group.budget, needs_short)
            )
        elif off < -SHARE_TOLERANCE - got.grain:
            warnings.append(
                f"{', '.join(group.names)}: {100 * got.long_share:.1f}% of the tokens are in long "
                f"documents, --long-token-share {target} is out of reach"
                + (" (the budget needs the short ones)" if got.long_tokens else " (it has none)")
            )
    if wider:
        raise TooTight(wider)
    _check_supply(groups, available, shares, mixture)


def _widen(limits: Limits, tokens: int, budget: int, needs_short: bool) -> Limits:
    order = min(limits.order * max(WIDER * budget / max(tokens, 1), WIDER), 1.0)
    keep_short = min(2 * limits.keep_short, 1.0) if needs_short else limits.keep_short
    return Limits(order, keep_short, min(limits.valid, order))


def _check_supply(
    groups: Sequence[Group],
    available: Mapping[str, int],
    shares: Mapping[str, float],
    mixture: Mixture,
) -> None:
    budgets = {name: group.budget for name, group in zip(available, groups, strict=True)}
    usable = {name: tokens * mixture.allow_repeat for name, tokens in available.items()}
    short = {
        name: (usable[name], budgets[name]) for name in budgets if budgets[name] > usable[name]
    }
    if not short:
        return
    weights = {"all sources": 1.0} if mixture.rules.is_pooled else shares
    most = min(int(usable[name] / share) for name, share in weights.items() if share > 0)
    others = []
    if not mixture.rules.is_pooled and any(available.values()):
        empty = [name for name in short if not available[name]]
        nothing = f" with 0 for {', '.join(empty)}" if empty else ""
        others.append(f"other --source-shares{nothing}")
    if mixture.keep_short is not None and mixture.keep_short < 1:
        others.append("a higher --short-keep-ratio")
    if all(available[name] for name in short):
        passes = max(math.ceil(budgets[name] / available[name]) for name in short)
        others.append(f"--allow-repeat {passes}")
    raise TooLittle(mixture.train_tokens, short, most, others)


def _choose_and_order(
    groups: Sequence[Group], mixture: Mixture, overhead: int, names: Sequence[str], scratch: Path
) -> tuple[NDArray, list[int]]:
    """Return the training documents in order, and the number of documents of each source."""
    path, num_passes, num_rows = scratch / "chosen.rows", 1, 0
    used = np.zeros(len(names), np.int64)
    with open(path, "wb") as file:
        for group in groups:
            for pieces in fill_budget(group, mixture, overhead):
                file.write(pieces.tobytes())
                num_rows += len(pieces)
                # Pieces of a document are consecutive.
                places = pieces[["file", "line"]]
                is_first = np.append(True, places[1:] != places[:-1]) & (pieces["repeat"] == 0)
                used += np.bincount(pieces["source"][is_first], minlength=len(names))
                num_passes = max(num_passes, int(pieces["repeat"][-1]) + 1)
    chosen = np.memmap(path, CHOSEN_DTYPE, "r", shape=(num_rows,))
    order = order_documents(chosen, len(names), num_passes, scratch, ORDER_NAME)
    path.unlink()
    return order, used.tolist()
