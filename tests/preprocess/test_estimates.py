"""Estimates from a part of a corpus, against the truth: do their intervals hold it?"""

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_long.corpus.blocks import sample_blocks
from megatron_long.corpus.documents import BadDocuments, FileState, RecordKeys, read_documents
from megatron_long.corpus.listing import find_inputs
from megatron_long.errors import ConfigError
from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.corpus_stats import gather_stats, read_info
from megatron_long.mixture.estimates.block_estimates import SourceEstimate
from megatron_long.mixture.estimates.forecast import SourceForecast, forecast
from megatron_long.mixture.estimates.intervals import Interval, exact
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.plan import make_plan
from megatron_long.preprocess.dry_run import _count_text, _supply_notes, plan_dataset
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.survey import survey_corpus
from megatron_long.preprocess.tokenize_file import TokenizeOptions, measure_file, tokenize_file
from tests.preprocess.estimate_corpus import THRESHOLD, counting_tokenizer, write_corpus

OPTIONS = TokenizeOptions(
    0, RecordKeys(source="source"), THRESHOLD, Admission(), np.dtype("<u2"), 1, 2
)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """A corpus of 46 files and nine sources, and its truth."""
    folder = tmp_path_factory.mktemp("hard")
    return folder, write_corpus(folder, scale=0.4)


def coverage(hits):
    """The share of intervals that hold the truth: the mean of all figures, and the least of one."""
    shares = [np.mean(found) for found in hits.values()]
    return np.mean(shares), min(shares)


def test_intervals_of_a_sample_hold_the_truth_and_no_source_is_missing(hard):
    folder, truth = hard
    files, total = find_inputs([folder]), sum(found.tokens for found in truth.values())
    hits = defaultdict(list)
    for seed in range(16):
        options = dataclasses.replace(OPTIONS, seed=seed)
        estimate = survey_corpus(files, counting_tokenizer(), options, 1 << 15)
        assert set(estimate.stats.sources) == set(truth)
        assert estimate.read_share < 0.3
        for name, true in truth.items():
            found = estimate.estimate(name)
            pairs = {
                "documents": (found.documents, true.documents),
                "tokens": (found.tokens, true.tokens),
                "share": (found.share, true.tokens / total),
                "long": (found.long_share, true.long_tokens / true.tokens),
            }
            for key, (interval, value) in pairs.items():
                hits[name, key].append(interval.low - 1e-9 <= value <= interval.high + 1e-9)
    mean, least = coverage(hits)
    assert mean > 0.93
    assert least >= 0.8


def test_a_sample_of_everything_is_exact(hard):
    folder, truth = hard
    estimate = survey_corpus(find_inputs([folder]), counting_tokenizer(), OPTIONS, 1 << 24)
    assert estimate.is_whole
    assert estimate.read_share == 1
    for name, true in truth.items():
        found = estimate.estimate(name)
        assert found.tokens.is_exact
        assert found.long_share.is_exact
        assert found.tokens.value == true.tokens
        assert found.documents.value == true.documents
        assert estimate.stats.sources[name].long_tokens == true.long_tokens


def test_errors_of_a_run_hold_the_truth(hard):
    """Of the tokens and of the share of long ones, where part of the documents was tokenized."""
    folder, truth = hard
    total = sum(found.tokens for found in truth.values())
    hits = defaultdict(list)
    limits = Limits(order=0.0, keep_short=0.0, valid=0.0, measure=0.005)
    for seed in range(20):
        options = dataclasses.replace(
            OPTIONS, seed=seed, admission=Admission(default=limits), extra_tokens=None
        )
        infos = [
            measure_file(item, counting_tokenizer(), options) for item in find_inputs([folder])
        ]
        stats = gather_stats(infos)
        tokens = sum(found.tokens for found in stats.sources.values())
        errors = stats.share_errors()
        for name, true in truth.items():
            found = stats.sources[name]
            assert found.documents == true.documents
            if found.documents_tokenized < 30:
                continue  # too few for the normal distribution
            hits[name, "tokens"].append(abs(found.tokens - true.tokens) <= found.tokens_error)
            off = abs(found.tokens / tokens - true.tokens / total)
            hits[name, "share"].append(off <= errors[name])
            if 0.02 < true.long_tokens / true.tokens < 0.98:
                off = abs(found.long_share - true.long_tokens / true.tokens)
                hits[name, "long"].append(off <= found.long_share_error + 1e-6)
    mean, least = coverage({key: found for key, found in hits.items() if len(found) > 10})
    assert mean > 0.9
    assert least >= 0.75


@pytest.mark.parametrize("short_share", [0.0, 0.66])
def test_what_a_sample_expects_of_the_lengths_holds_what_a_run_makes(hard, short_share, tmp_path):
    folder, truth = hard
    files = find_inputs([folder])
    big = [name for name, found in truth.items() if found.tokens > 50_000]
    shares = {name: float(name in big) for name in truth}
    mixture = Mixture(
        train_tokens=40_000 * len(big),
        long_threshold_tokens=THRESHOLD,
        valid_tokens_per_source=500,
        source_shares=shares,
        short_share=short_share,
        allow_repeat=4,
    )
    hits = defaultdict(list)
    for seed in range(8):
        options = dataclasses.replace(OPTIONS, seed=seed)
        survey = survey_corpus(files, counting_tokenizer(), options, 1 << 15)
        expected = forecast(survey, mixture)
        folders = [tmp_path / f"{seed}-{index}" for index in range(len(files))]
        for index, file in enumerate(files):
            tokenize_file(file, index, counting_tokenizer(), options, folders[index])
        (tmp_path / f"{seed}-plan").mkdir()
        made = make_plan(folders, mixture, Admission(), 2, tmp_path / f"{seed}-plan").sources
        for name in big:
            after, true = expected[name].long_share_after, made[name].long_share_after
            hits[name].append(after.low - 1e-9 <= true <= after.high + 1e-9)
            usable, held = expected[name].tokens_usable, truth[name].tokens - 500
            most = expected[name].corpus.tokens.high
            plain = short_share * 40_000
            assert plain <= usable.low <= usable.value <= usable.high <= plain + 4 * (most - plain)
            too_much = dataclasses.replace(mixture, train_tokens=100 * held * len(big))
            usable = forecast(survey, too_much)[name].tokens_usable
            passes = 1 if short_share else 4  # documents as they are take all, and are used once
            assert usable.value <= passes * expected[name].corpus.tokens.value
    mean, least = coverage(hits)
    assert mean > 0.9
    assert least >= 0.75


def test_a_stratum_without_tokenized_documents_counts_in_every_figure():
    """Large documents, all long, were left out of the share of long tokens, not out of the tokens."""
    squares = [0.0] * 5
    strata = [
        [0, 0, 12, 100, 500_000, 10, 50_000, 8_000, 12_500, *squares],
        [0, 0, 14, 10, 200_000, 0, 0, 0, 0, *squares],
    ]
    lengths = [[0, 0, 12, 11, 4_500], [0, 0, 12, 12, 8_000]]
    info = {"sources": ["Book"], "strata": strata, "lengths": lengths, "bad": []}
    info |= {"documents_empty": 0, "documents_bad": 0, "text_bytes": 700_000}
    stats = gather_stats([info]).sources["Book"]
    assert stats.tokens == 175_000
    assert sum(stats.tokens_by_length[12:]) == stats.long_tokens
    assert stats.long_share == 8_000 / 12_500


def test_blocks_divide_the_documents(hard):
    """Each belongs to one block, whatever its length."""
    from megatron_long.corpus import blocks

    item = max(find_inputs([hard[0]]), key=lambda item: item.size_bytes)
    found = []
    bounds = [*range(0, item.size_bytes, 5000), item.size_bytes]
    for start, end in itertools.pairwise(bounds):
        piece = dataclasses.replace(blocks._lines(item, start, end), xxh3_128="known")
        for batch in read_documents(piece, OPTIONS.keys, BadDocuments(), FileState()):
            found += [document.text for document in batch]
    lines = Path(item.path).read_bytes().splitlines()
    assert found == [orjson.loads(line)["text"] for line in lines]


def test_the_sample_is_spread_over_sizes_and_positions(tmp_path):
    for number in range(300):
        lines = b'{"text": "a", "source": "b"}\n' * (400 if number % 3 else 20)
        (tmp_path / f"{number:03d}.jsonl").write_bytes(lines)
    sample = sample_blocks(find_inputs([tmp_path]), 1 << 20, 0)
    strata = {block.stratum for block in sample.blocks}
    assert len(sample.strata) == len(strata) == 2
    for stratum in strata:
        names = [block.item.name for block in sample.blocks if block.stratum == stratum]
        assert min(names) < "060.jsonl"
        assert max(names) > "240.jsonl"
    runs = [sum(b.run_blocks for b in sample.blocks if b.stratum == s) for s in sorted(strata)]
    assert runs == [stratum.num_blocks for stratum in sample.strata]


def config(folder, model_file, **changes):
    mixture = Mixture(
        **{"train_tokens": 20_000, "long_threshold_tokens": 500, "valid_tokens_per_source": 500}
        | changes
    )
    keys = RecordKeys(source="source")
    return PreprocessConfig(
        inputs=[folder], tokenizer=model_file, mixture=mixture, keys=keys, engine="reference"
    )


def sampled(asked, text_bytes=1 << 15):
    return plan_dataset(asked, text_bytes)


def test_nothing_is_refused_on_the_word_of_a_sample(hard, model_file):
    folder, truth = hard
    shares = dict.fromkeys(truth, 1.0) | {"Rare": 1.0}
    found = sampled(config(folder, model_file, source_shares=shares))
    assert set(found.expected) == set(truth)
    assert any(note.startswith("Rare: named, but not in the sample") for note in found.notes)
    assert any("a source that is not listed has less than" in note for note in found.notes)
    with pytest.raises(ConfigError, match="is more than the corpus can hold"):  # its bytes say so
        sampled(config(folder, model_file, train_tokens=10**9))
    found = sampled(config(folder, model_file, train_tokens=12 * 10**6))
    notes = [note for note in found.notes if note.endswith("refused")]
    assert len(notes) == len(truth)
    assert any("the run is refused" in note for note in notes)
    named = {"strategy": "upsample-sources", "upsampled_shares": {"Rare": 0.2, "Lisp": 0.1}}
    found = sampled(config(folder, model_file, **named))
    assert any(note.startswith("Rare: named") for note in found.notes)


def test_shares_that_fit_only_sources_the_sample_lacks_are_told(hard, model_file):
    folder, truth = hard
    shares = dict.fromkeys(truth, 0.0) | {"Rare": 1.0}
    found = sampled(config(folder, model_file, source_shares=shares))
    assert found.expected == {}
    assert any("no table, because of the sources of the sample" in note for note in found.notes)


def test_a_damaged_parquet_file_is_told(hard, tmp_path, model_file):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 1000)
    good = b'{"text": "bocu dofa", "source": "Book"}\n' * 4000
    (tmp_path / "b.jsonl").write_bytes(good)
    found = sampled(config(tmp_path, model_file))
    assert any("a.parquet: cannot be read" in note for note in found.notes)


def test_a_source_without_a_share_is_refused_as_it_is_certain(hard, model_file):
    with pytest.raises(ConfigError, match=r"gives no share to .*Book"):
        sampled(config(hard[0], model_file, source_shares={"Lisp": 1.0}))


def test_bad_documents_of_a_sample_are_told(tmp_path, model_file):
    good = b'{"text": "bocu dofa", "source": "Book"}\n' * 2000
    (tmp_path / "a.jsonl").write_bytes(good + b"{}\n" * 50 + good)
    found = sampled(config(tmp_path, model_file))
    assert any("bad documents in the sample: 50, which a run stops at" in n for n in found.notes)


def test_one_document_that_is_most_of_the_bytes_tells_nothing_of_the_others(tmp_path):
    """It has other tokens per byte, and is tokenized whole."""
    rng, held = np.random.default_rng(0), []
    for seed in range(20):
        counts = rng.integers(20, 200, 1000).tolist()
        rows = [{"text": f"{count} {'ab ' * count}", "source": "Book"} for count in counts]
        rows.insert(500, {"text": "200000 " + "abcdefghijk " * 200_000, "source": "Book"})
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
        options = dataclasses.replace(OPTIONS, seed=seed)
        files = find_inputs([tmp_path])
        found = survey_corpus(files, counting_tokenizer(), options, 1 << 19)
        assert 50 <= found.stats.sources["Book"].documents_tokenized < 1001
        interval, true = found.estimate("Book").tokens, sum(counts) + 200_000 + 2 * 1001
        held.append(interval.low <= true <= interval.high)
        assert interval.value == pytest.approx(true, rel=0.01)
    assert np.mean(held) >= 0.85


@pytest.mark.parametrize("tokenized", [0, 1, 2])
def test_a_stratum_of_which_nearly_nothing_is_known_has_a_wide_error(tokenized):
    """Next to one that was tokenized whole, of other tokens per byte."""
    size, tokens = 1000.0 * tokenized, 500.0 * tokenized
    squares = [1e6 * tokenized, 25e4 * tokenized, 5e5 * tokenized, 0.0, 0.0]
    strata = [
        [0, 0, 9, 100, 100_000, tokenized, size, 0, tokens, *squares],
        [0, 0, 20, 1, 1_000_000, 1, 1_000_000, 1e5, 1e5, 1e12, 1e10, 1e11, 1e10, 1e11],
    ]
    info = {"sources": ["Book"], "strata": strata, "lengths": [[0, 0, 20, 16, 100_000]], "bad": []}
    info |= {"documents_empty": 0, "documents_bad": 0, "text_bytes": 1_100_000}
    stats = gather_stats([info]).sources["Book"]
    assert len(stats.groups) == 2
    assert (stats.tokens_error > 20_000) == (tokenized < 2)  # two alike tell that all are


def test_two_documents_of_which_one_is_most_of_the_bytes_tell_no_deviation():
    """Of the large stratum the other document may be anything, whatever the small one says."""
    small = [0, 0, 9, 100, 100_000, 1, 1000, 0, 500, 1e6, 25e4, 5e5, 0.0, 0.0]
    large = [0, 0, 20, 2, 2_000_000, 1, 1_000_000, 1e5, 1e5, 1e12, 1e10, 1e11, 1e10, 1e11]
    info = {"sources": ["Book"], "strata": [small, large], "lengths": [], "bad": []}
    info |= {"documents_empty": 0, "documents_bad": 0, "text_bytes": 2_100_000}
    stats = gather_stats([info]).sources["Book"]
    assert [len(group.keys) for group in stats.groups] == [2]
    assert stats.tokens_error > 100_000


def test_figures_have_the_digits_that_tell_their_interval():
    assert _count_text(Interval(15_220, 15_218, 15_221)) == "15.220K (15.218K-15.221K)"
    assert _count_text(Interval(122, 121.9, 122.1)) == "122 (122-122)"
    assert _count_text(Interval(15_220, 15_118, 15_321)) == "15.2K (15.1K-15.3K)"


def test_one_source_alone_gets_exactly_what_is_asked(tmp_path, model_file):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "bocu dofa", "source": "Book"}\n' * 4000)
    assert sampled(config(tmp_path, model_file)).expected["Book"].tokens_asked == exact(20_000)


def test_what_is_measured_changes_no_row(hard, tmp_path):
    """Only counts: tokens and rows of what may be used are the same."""
    item, made = find_inputs([hard[0]])[0], {}
    for measure in (0.0, 0.02):
        limits = Limits(order=0.3, keep_short=0.2, valid=0.05, measure=measure)
        options = dataclasses.replace(OPTIONS, admission=Admission(default=limits))
        folder = tmp_path / f"{measure}"
        tokenize_file(item, 0, counting_tokenizer(), options, folder)
        stats = gather_stats([read_info(folder)])
        done = sum(found.documents_tokenized for found in stats.sources.values())
        made[measure] = (
            done,
            (folder / "rows.npy").read_bytes(),
            (folder / "tokens.bin").read_bytes(),
        )
    assert made[0.0][1:] == made[0.02][1:]
    assert made[0.0][0] < made[0.02][0]


@pytest.mark.parametrize(
    ("asked", "says"), [(800, None), (950, "may be refused"), (1001, "is refused")]
)
def test_a_sample_says_that_a_run_is_refused_only_if_all_documents_are_too_few(asked, says):
    """What is dropped and held out is random: the run may have more than is expected."""
    whole = SourceEstimate(exact(10), exact(1000), exact(1.0), exact(0.5))
    found = SourceForecast(whole, exact(asked), Interval(900, 880, 920), None)
    notes = list(_supply_notes({"a": found}, Mixture(train_tokens=asked)))
    assert [says in note for note in notes] == ([True] if says else [])
