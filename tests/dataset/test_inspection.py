"""What inspect_dataset shows is what lies in the files, and damage is found."""

import dataclasses
import os
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_long.dataset.indexed import HEADER, IndexedDatasetReader
from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import read_manifest, write_manifest
from megatron_long.dataset.report_page import report_page, write_report
from megatron_long.dataset.tables import add_sources, plot_sources, print_table
from megatron_long.dataset.verification import verify_dataset
from megatron_long.errors import ConfigError, DataError
from megatron_long.hashing import hash_file
from megatron_long.tokenizer.loading import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
THRESHOLD = 300


def run_tool(name, *words):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, f"tools/{name}.py", *map(str, words)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def dataset(corpus, model_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("inspection") / "out"
    words = {
        "--input": corpus,
        "--tokenizer": model_file,
        "--output": output,
        "--train-tokens": "9K",
        "--long-threshold": THRESHOLD,
        "--short-keep-ratio": 0.4,
        "--valid-tokens-per-source": "1K",
        "--source-shares": "natural",
    }
    made = run_tool("preprocess_mix", *[word for pair in words.items() for word in pair])
    assert made.returncode == 0, made.stderr
    return output


@pytest.fixture
def damaged(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "out")


def test_documents_are_shown_with_text_and_origin(dataset, records):
    browser, names = DatasetBrowser(dataset), ["a.jsonl", "sub/b.jsonl.gz", "sub/c.jsonl.zst"]
    first_record = dict(zip(names, (0, 250, 400), strict=True))
    for document in range(0, len(browser.reader), 5):
        head, text = browser.describe_document(document).split("\n", 1)
        found = re.match(r"document (\d+) of train: (\w+), (.+):(\d+), ([\d,]+) tokens", head)
        number, source, name, line, length = found.groups()
        record = records[first_record[name] + int(line) - 1]
        assert record["text"].startswith(text)
        assert record["meta"]["redpajama_set_name"].lower() == f"redpajama{source}".lower()
        assert int(length) == browser.reader.lengths[document]
        assert int(number) == document


def test_windows_are_covered_by_their_parts(dataset):
    browser, seq_length = DatasetBrowser(dataset), 512
    for window in range(browser.reader.num_tokens // seq_length - 1):
        parts = list(browser.window_parts(window, seq_length))
        tokens = np.concatenate([part.tokens for part in parts])
        expected = browser.reader.read_span(window * seq_length, seq_length)
        np.testing.assert_array_equal(tokens, expected)
        for part in parts:
            whole = browser.reader.read(part.document)
            assert part.length_tokens == len(whole)
            np.testing.assert_array_equal(
                part.tokens, whole[part.first_token : part.first_token + part.num_tokens]
            )


def test_held_out_documents_can_be_read(dataset):
    browser = DatasetBrowser(dataset, "Book")
    assert "of Book: Book, a.jsonl:" in browser.describe_document(0)
    with pytest.raises(ConfigError, match="--split Nothing: the dataset has train, Book"):
        DatasetBrowser(dataset, "Nothing")


def test_numbers_out_of_range_name_the_range(dataset):
    browser = DatasetBrowser(dataset)
    count = len(browser.reader)
    with pytest.raises(ConfigError, match=f"--document {count}: train has documents 0 to"):
        browser.describe_document(count)
    with pytest.raises(ConfigError, match="has 8 windows, counted from 0"):
        list(browser.window_parts(8, 1024))


def test_a_sound_dataset_passes(dataset):
    assert len(list(verify_dataset(dataset))) == 5


def rewrite_manifest(folder, manifest):
    """Make a manifest that agrees with damaged files, so that only their contents can tell."""
    files = {name: hash_file(folder / name) for name in manifest.train.files}
    train = dataclasses.replace(manifest.train, files=files)
    write_manifest(folder, dataclasses.replace(manifest, train=train))


def swap_lengths(folder):
    """Move a token from a document to the next in the index alone."""
    with open(folder / "train.idx", "r+b") as file:
        file.seek(HEADER.size)
        first, second = struct.unpack("<2i", file.read(8))
        file.seek(HEADER.size)
        file.write(struct.pack("<2i", first - 1, second + 1))


def set_token(folder, at, value):
    tokens = np.memmap(folder / "train.bin", "<u2", "r+")
    tokens[at] = value
    tokens.flush()


def change_rows(folder, name, value):
    rows = np.load(folder / "documents.npy")
    rows[name][0] = (rows[name][0] + 1) % 3 if value is None else value
    np.save(folder / "documents.npy", rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_lengths, "its offsets are not the sums of its lengths"),
        (lambda folder: set_token(folder, 1, 2), "token 1 is an EOD inside a document"),
        (lambda folder: set_token(folder, -1, 5), "number of EOD tokens is"),
        (lambda folder: set_token(folder, 3, 60_000), "token at 3 is 60000"),
        (lambda folder: change_rows(folder, "length_tokens", 1), "its lengths are not those of"),
        (lambda folder: change_rows(folder, "file", 99), "file number is 99"),
        (lambda folder: change_rows(folder, "source", None), "tokens of each source is"),
    ],
)
def test_damage_that_hashes_do_not_show_is_found(damage, message, damaged):
    manifest = read_manifest(damaged)
    damage(damaged)
    rewrite_manifest(damaged, manifest)
    with pytest.raises(DataError, match=message):
        list(verify_dataset(damaged))


def test_damaged_bytes_are_found_by_hash(damaged):
    set_token(damaged, 5, 7)
    with pytest.raises(DataError, match=r"train\.bin is damaged: its hash"):
        list(verify_dataset(damaged))


def test_another_tokenizer_is_found(damaged, json_vocabulary):
    manifest = read_manifest(damaged)
    (damaged / "tokenizer" / "tokenizer.model").write_bytes(json_vocabulary)
    with pytest.raises(DataError, match=r"tokenizer\.model has .* its manifest says"):
        list(verify_dataset(damaged))
    write_manifest(damaged, dataclasses.replace(manifest, tokenizer_files={}))  # earlier versions
    with pytest.raises(DataError, match="is not the vocabulary of the manifest"):
        list(verify_dataset(damaged))


@pytest.fixture
def json_vocabulary(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words entirely"] * 5),
        model_prefix=str(tmp_path / "other"),
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return (tmp_path / "other.model").read_bytes()


class Page(HTMLParser):
    """Collects tables, images and every address that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.tables, self.addresses, self.open_tags, self.in_cell = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag
        self.in_cell = False


def test_page_holds_the_numbers_and_needs_no_network(dataset, tmp_path):
    manifest = read_manifest(dataset)
    write_report(tmp_path / "report", manifest, "mix")
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.open_tags == []
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert "http" not in text
    header, *rows = page.tables[0]
    column = header.index("training tokens")
    tokens = {row[0]: int(row[column].replace(",", "")) for row in rows}
    assert tokens == {name: info.tokens_kept for name, info in manifest.sources.items()} | {
        "all": manifest.train.num_tokens
    }
    every_cell = {cell for table in page.tables for row in table for cell in row}
    assert {info.xxh3_128 for info in manifest.train.files.values()} <= every_cell
    assert {item.name for item in manifest.inputs} <= every_cell
    assert manifest.tokenizer.vocabulary_sha256 in every_cell


def test_tables_leave_no_digit_out(capsys):
    """In a file of 200 columns; longer rows are folded."""
    cells = [f"{number:,} ({number:,}-{number:,})" for number in range(10**11, 10**11 + 9)]
    print_table([str(number) for number in range(9)], [cells])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert sum(character.isdigit() for character in shown) == 9 + 9 * 3 * 12


def test_page_says_that_the_order_of_a_small_set_is_not_measured(dataset):
    manifest = read_manifest(dataset)
    text = report_page(manifest, "mix", b"")
    assert "not measured: the set is smaller than a window of 4,000,000 tokens" in text
    assert "deviation" not in text
    order = dataclasses.replace(manifest.order, num_windows=2, largest_deviation=0.25)
    text = report_page(dataclasses.replace(manifest, order=order), "mix", b"")
    assert "largest deviation of a source&#39;s share in a window</td><td>25.00%" in text


def test_page_says_in_words_what_became_of_the_corpus(dataset):
    manifest = read_manifest(dataset)
    text = report_page(manifest, "my-mix", b"")
    assert "<title>my-mix: dataset</title>" in text
    total = add_sources(manifest.sources)
    assert (
        f"Long documents (300 tokens and more): {total.long_share_before:.1%} → {total.long_share_after:.1%} "
        "of the tokens, shares of the sources unchanged within 0.001."
    ) in text
    assert "≈" not in text
    page = Page()
    page.feed(text)
    assert [row[0] for row in page.tables[0]] == ["source", "Book", "C4", "GitHub", "all"]
    assert len(page.tables[0][0]) <= 11
    first_cells = [row[0] for table in page.tables for row in table if row]
    assert not [cell for cell in first_cells if re.fullmatch(r"[a-z]+(_[a-z]+)+", cell)]
    headers = [cell for table in page.tables for cell in table[0]]
    assert not [cell for cell in headers if "_" in cell and cell != "xxh3_128"]


def test_page_marks_estimates_and_changed_shares_and_shows_warnings(dataset):
    manifest = read_manifest(dataset)
    book = manifest.sources["Book"]
    manifest.sources["Book"] = dataclasses.replace(
        book, tokens_in_is_exact=False, documents_tokenized=3, share_got=book.share_got + 0.02
    )
    manifest = dataclasses.replace(manifest, warnings=["C4: too <short>"])
    text, page = report_page(manifest, "mix", b""), Page()
    page.feed(text)
    header, *rows = page.tables[0]
    marked = {row[0]: [header[k] for k, cell in enumerate(row) if "≈" in cell] for row in rows}
    estimated = ["tokens in the corpus", "share of the corpus", "long before"]
    assert marked == {
        "Book": estimated,
        "C4": ["share of the corpus"],
        "GitHub": ["share of the corpus"],
        "all": ["tokens in the corpus", "long before"],
    }
    assert "≈ marks estimates: " in text
    assert re.search(r"share of Book: ≈ [\d.]+% → [\d.]+%, other sources change less\.", text)
    assert "<li>C4: too &lt;short&gt;</li>" in text


def test_report_is_the_same_every_time(dataset, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, read_manifest(dataset), "mix")
    for file in ("index.html", "lengths_and_sources.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_page_escapes_names(dataset):
    manifest = read_manifest(dataset)
    manifest.sources["<b>&"] = manifest.sources.pop("Book")
    page = Page()
    page.feed(report_page(manifest, "<i>", b""))
    assert "<b>&" in [row[0] for row in page.tables[0]]
    assert "<h1>Dataset &lt;i&gt;</h1>" in report_page(manifest, "<i>", b"")


def test_figure_draws_shares_of_all_tokens(dataset):
    manifest = read_manifest(dataset)
    by_length, by_source = plot_sources(manifest.sources, THRESHOLD).axes
    for axes in (by_length, by_source):
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(200, abs=1e-6)
    long_bars = [bar.get_height() for bar in by_source.patches[6:9]]
    total = add_sources(manifest.sources)
    assert sum(long_bars) == pytest.approx(100 * total.long_share_after)


def test_tool_shows_documents_windows_and_report(dataset, tmp_path):
    shown = run_tool("inspect_dataset", dataset, "--verify", "--report", tmp_path / "report")
    assert shown.returncode == 0, shown.stderr
    assert "every index matches its tokens" in shown.stdout
    assert (tmp_path / "report" / "index.html").is_file()
    again = run_tool("inspect_dataset", dataset, "--report", tmp_path / "report")
    assert again.returncode == 2
    assert "exists already" in " ".join(again.stderr.split())
    window = run_tool("inspect_dataset", dataset, "--window", 2, "--seq-length", 1024)
    lines = window.stdout.splitlines()
    assert lines[0].split()[:3] == ["offset", "tokens", "document"]
    assert sum(int(line.split()[1].replace(",", "")) for line in lines[1:]) == 1024
    document = run_tool("inspect_dataset", dataset, "--document", 0)
    tokens = IndexedDatasetReader(dataset / "train").read(0)
    expected = load_tokenizer(dataset / "tokenizer").decode(tokens[1:-1])
    assert document.stdout.split("\n", 1)[1].strip() == expected.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one dataset folder"),
        (["DATASET", "--dataset", "DATASET"], "give one dataset folder"),
        (["DATASET", "--window", "1"], "--window N and --seq-length S belong together"),
        (["DATASET", "--document", "-1"], "--document -1: train has documents 0 to"),
        (["DATASET", "--plot", "figure.txt"], "the name must end in .png, .pdf, .svg"),
    ],
)
def test_wrong_words_are_refused(words, message, dataset):
    result = run_tool("inspect_dataset", *[str(dataset) if w == "DATASET" else w for w in words])
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


def test_the_dataset_brings_its_report(dataset, tmp_path):
    write_report(tmp_path / "again", read_manifest(dataset), dataset.name)
    for file in ("index.html", "lengths_and_sources.png"):
        assert (dataset / "report" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
