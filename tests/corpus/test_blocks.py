"""Samples of parquet and compressed files, whose middle is not found by seeking, against the truth."""

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest

from megatron_long.corpus import blocks
from megatron_long.corpus.documents import BadDocuments, FileState, read_documents
from megatron_long.corpus.listing import find_inputs
from megatron_long.preprocess.survey import survey_corpus
from tests.preprocess.estimate_corpus import counting_tokenizer
from tests.preprocess.test_estimates import OPTIONS, config, coverage, sampled


def write_uneven(folder, write_jsonl, seed, num_files=12, num_parts=8):
    """Write compressed files whose parts differ in lengths and sources; return the tokens of each source."""
    rng, tokens = np.random.default_rng(seed), defaultdict(int)
    for number in range(num_files):
        rows = []
        for mean, share in zip(
            rng.uniform(60, 180, num_parts), rng.uniform(0.2, 0.8, num_parts), strict=True
        ):
            for count in rng.poisson(mean, 40).tolist():
                name = "Book" if rng.random() < share else "Web"
                text = rng.integers(97, 106, 3 * count, np.uint8).tobytes().decode()
                rows.append({"text": f"{count} {text}", "source": name})
                tokens[name] += count + 2
        write_jsonl(folder / f"{number:02d}.jsonl.zst", rows)
    return tokens


def test_the_rest_of_compressed_files_widens_the_intervals(tmp_path, write_jsonl):
    """Of each file the beginning is read, and what follows is unlike it."""
    hits, widths = defaultdict(list), {}
    for seed in range(20):
        tokens = write_uneven(tmp_path / str(seed), write_jsonl, seed)
        files = find_inputs([tmp_path / str(seed)])
        for text_bytes in (1 << 12, 1 << 22):
            found = survey_corpus(files, counting_tokenizer(), OPTIONS, text_bytes)
            assert (found.unread_share > 0.3) == (text_bytes == 1 << 12)
            for name, true in tokens.items():
                pairs = {
                    "tokens": (found.estimate(name).tokens, true),
                    "share": (found.estimate(name).share, true / sum(tokens.values())),
                }
                for key, (interval, value) in pairs.items():
                    held = interval.low - 1e-9 <= value <= interval.high + 1e-9
                    hits[text_bytes, key].append(held)
                    widths[text_bytes, key] = interval.high - interval.low
    mean, least = coverage(hits)
    assert mean > 0.93
    assert least >= 0.85
    assert widths[1 << 12, "tokens"] > 0 == widths[1 << 22, "tokens"]


def test_what_cannot_be_reached_in_compressed_files_is_told(tmp_path, model_file, write_jsonl):
    write_uneven(tmp_path, write_jsonl, 0)
    for text_bytes, is_told in ((1 << 11, True), (1 << 16, False)):
        notes = sampled(config(tmp_path, model_file), text_bytes).notes
        assert any("was not sampled, the rest of compressed" in note for note in notes) == is_told


def write_sorted_tables(folder, group_rows):
    """Write parquet files with long documents last; return their tokens."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng, tokens = np.random.default_rng(0), 0
    for number in range(3):
        counts = np.sort(rng.integers(10, 200, 20_000))
        tokens += int((counts + 2).sum())
        texts = [f"{count} {'ab ' * int(count)}" for count in counts]
        table = pyarrow.table({"text": texts, "source": ["Book"] * len(texts)})
        path, plain = folder / f"{number}.parquet", {"compression": "none", "use_dictionary": False}
        parquet.write_table(table, path, row_group_size=group_rows, **plain)
    return tokens


@pytest.mark.parametrize("group_rows", [500, 20_000])
def test_rows_of_parquet_files_are_sampled_also_inside_large_groups(group_rows, tmp_path):
    tokens = write_sorted_tables(tmp_path, group_rows)
    held, found = [], []
    for seed in range(10):
        options = dataclasses.replace(OPTIONS, seed=seed)
        estimate = survey_corpus(find_inputs([tmp_path]), counting_tokenizer(), options, 1 << 18)
        assert not estimate.is_whole
        assert estimate.read_share < 0.8
        interval = estimate.estimate("Book").tokens
        held.append(interval.low <= tokens <= interval.high)
        found.append(interval.value / tokens)
    assert np.mean(held) >= 0.8
    assert np.mean(found) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("group_rows", [500, 20_000])
def test_parquet_files_that_were_read_whole_are_counted_exactly(group_rows, tmp_path):
    tokens = write_sorted_tables(tmp_path, group_rows)
    estimate = survey_corpus(find_inputs([tmp_path]), counting_tokenizer(), OPTIONS, 1 << 27)
    assert estimate.is_whole
    assert estimate.read_share == 1
    found = estimate.estimate("Book")
    assert (found.documents.is_exact, found.documents.value) == (True, 60_000)
    assert (found.tokens.is_exact, found.tokens.value) == (True, tokens)


@pytest.mark.parametrize("group_rows", [7, 1100, 3000])
@pytest.mark.parametrize("step", [97, 997])
def test_blocks_divide_the_rows_of_a_parquet_file(step, group_rows, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"{number} " + "ab " * (number % 50) for number in range(3000)]
    table = pyarrow.table({"text": texts, "source": ["Book"] * len(texts)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=group_rows)
    (item,), rows = find_inputs([tmp_path]), []
    for start, end in itertools.pairwise([*range(0, item.size_bytes, step), item.size_bytes]):
        piece = dataclasses.replace(blocks._rows(item, start, end), xxh3_128="known")
        for batch in read_documents(piece, OPTIONS.keys, BadDocuments(), FileState()):
            rows += batch
    assert [row.text for row in rows] == texts
    assert [row.line for row in rows] == list(range(1, 3001))
