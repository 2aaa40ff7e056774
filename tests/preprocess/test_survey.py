"""Large corpora: what is tokenized is a part, what comes out is the same."""

import dataclasses

import numpy as np
import orjson
import pytest

from megatron_long.corpus.listing import find_inputs
from megatron_long.dataset.manifest import share_at_least
from megatron_long.dataset.tables import add_sources
from megatron_long.mixture import plan as plan_module
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import survey as survey_module
from megatron_long.preprocess.dry_run import plan_dataset
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig

NAMES = {"Book": 0.3, "C4": 0.7}


@pytest.fixture(scope="module")
def big_corpus(tmp_path_factory):
    """16,000 documents in eight files; one in eight is long."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("big")
    words = ["bocu", "dofa", "nulo", "rite", "sapo", "meg", "lin", "ta"]
    for file in range(8):
        lines = []
        for number in range(2000):
            count = generator.integers(300, 900) if number % 8 == 0 else generator.integers(5, 100)
            text = " ".join(generator.choice(words, count))
            source = "Book" if generator.random() < 0.3 else "C4"
            lines.append(orjson.dumps({"text": f"{file} {number} {text}", "source": source}))
        (folder / f"{file}.jsonl").write_bytes(b"\n".join(lines))
    return folder


@pytest.fixture
def config(big_corpus, model_file):
    mixture = Mixture(
        train_tokens=100_000,
        long_threshold_tokens=500,
        valid_tokens_per_source=3000,
        source_shares=NAMES,
    )
    return PreprocessConfig(
        inputs=[big_corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )


def surveyed(monkeypatch, margin=1.5):
    monkeypatch.setattr(survey_module, "SURVEY_FROM_BYTES", 0)
    monkeypatch.setattr(survey_module, "MARGIN", margin)
    monkeypatch.setattr(survey_module, "SURVEY_TEXT_BYTES", 1 << 20)


def with_mixture(config, **changes):
    return dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "original"},
        {"strategy": "cut", "cut_length_tokens": 200},
        {"strategy": "global", "source_shares": "natural"},
        {"long_token_share": 0.8},
        {"strategy": "upsample-sources", "upsampled_shares": {"Book": 0.6}},
    ],
)
def test_a_survey_saves_work_and_changes_no_token(changes, config, tmp_path, monkeypatch):
    config = with_mixture(config, **changes)
    whole = preprocess(config, tmp_path / "whole")
    surveyed(monkeypatch)
    ours = preprocess(config, tmp_path / "out")
    for name in ("train.bin", "train.idx", "documents.npy", "valid/Book.bin", "valid/C4.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, info in ours.sources.items():
        before = whole.sources[name]
        assert before.tokens_in_is_exact
        assert not info.tokens_in_is_exact
        assert info.documents_in == before.documents_in
        assert info.documents_tokenized < before.documents_tokenized
        assert abs(info.tokens_in - before.tokens_in) <= 1.5 * info.tokens_in_error
        assert info.tokens_in_error < 0.1 * info.tokens_in
        assert info.tokens_in == pytest.approx(before.tokens_in, rel=0.05)
        assert info.long_share_before == pytest.approx(before.long_share_before, abs=0.05)
        off = info.long_share_before - before.long_share_before
        assert abs(off) <= 1.5 * info.long_share_before_error < 0.1
    tokenized = sum(info.tokens_tokenized for info in ours.sources.values())
    assert tokenized < 0.6 * sum(info.tokens_in for info in whole.sources.values())


def test_natural_shares_are_known_to_one_percent(config, tmp_path, monkeypatch):
    """And every figure of long documents is the same number."""
    config = with_mixture(config, source_shares="natural", long_threshold_tokens=512)
    whole = preprocess(config, tmp_path / "whole").sources
    surveyed(monkeypatch)
    made = preprocess(config, tmp_path / "out")
    assert not made.warnings
    for name, info in made.sources.items():
        assert info.documents_tokenized < info.documents_in
        assert 0 < info.share_in_error < 0.01 * info.share_asked
        assert abs(info.share_asked - whole[name].share_asked) < 1.5 * info.share_in_error
        assert info.long_share_before == pytest.approx(
            share_at_least(info.tokens_by_length_before, 512), abs=1e-5
        )
        off = info.long_share_before - whole[name].long_share_before
        assert abs(off) < 1.5 * info.long_share_before_error
    both = add_sources(made.sources)
    off = both.long_share_before - add_sources(whole).long_share_before
    assert abs(off) < 1.5 * both.long_share_before_error
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert f"{100 * both.long_share_before:.2f}% ±{100 * both.long_share_before_error:.2f}" in page


def test_natural_shares_that_are_not_known_well_are_a_warning(config, tmp_path, monkeypatch):
    surveyed(monkeypatch)
    monkeypatch.setattr(plan_module, "NATURAL_ERROR", 1e-5)
    made = preprocess(with_mixture(config, source_shares="natural"), tmp_path / "out")
    assert any("its natural share of" in warning for warning in made.warnings)


def test_limits_that_prove_too_tight_are_widened(config, tmp_path, monkeypatch):
    preprocess(config, tmp_path / "whole")
    surveyed(monkeypatch, margin=0.2)
    preprocess(dataclasses.replace(config, keep_work=True), tmp_path / "out")
    assert len(list((tmp_path / "out.work").glob("admission.*"))) > 1
    assert (tmp_path / "out" / "train.bin").read_bytes() == (
        tmp_path / "whole" / "train.bin"
    ).read_bytes()


def test_short_documents_are_dropped_before_they_are_tokenized(config, tmp_path):
    """Without a survey everything could be held out, so only a limit on that shows the bound at work."""
    from megatron_long.mixture.admission import Admission, Limits
    from megatron_long.mixture.corpus_stats import gather_stats, read_info
    from megatron_long.mixture.rows import ROW_DTYPE
    from megatron_long.preprocess.preprocess_config import tokenize_options
    from megatron_long.preprocess.tokenize_file import tokenize_file
    from megatron_long.tokenizer.loading import load_tokenizer

    tokenizer, item = load_tokenizer(config.tokenizer, "reference"), find_inputs(config.inputs)[0]
    admission = Admission(default=Limits(1.0, 0.1, 0.0))
    options = dataclasses.replace(tokenize_options(config, tokenizer), admission=admission)
    rows = {}
    for name, extra in (("bound", options.extra_tokens), ("none", None)):
        changed = dataclasses.replace(options, extra_tokens=extra)
        tokenize_file(item, 0, tokenizer, changed, tmp_path / name)
        rows[name] = np.fromfile(tmp_path / name / "rows.npy", ROW_DTYPE)
    assert rows["bound"]["line"].tolist() == rows["none"]["line"].tolist()
    for file in ("tokens.bin", "rows.npy"):
        assert (tmp_path / "bound" / file).read_bytes() == (tmp_path / "none" / file).read_bytes()
    stats = {name: gather_stats([read_info(tmp_path / name)]).sources["C4"] for name in rows}
    assert stats["none"].is_exact
    assert stats["bound"].documents_tokenized < 0.7 * stats["none"].documents_tokenized
    assert stats["bound"].tokens == pytest.approx(stats["none"].tokens, rel=0.02)
    assert abs(stats["bound"].tokens - stats["none"].tokens) <= 1.5 * stats["bound"].tokens_error
    assert stats["bound"].long_tokens == stats["none"].long_tokens


def holds(interval, value):
    """Whether an interval, made half as wide again (one draw of many figures), holds a value."""
    low = interval.value - 1.5 * (interval.value - interval.low) - 1e-3 * interval.value
    high = interval.value + 1.5 * (interval.high - interval.value) + 1e-3 * interval.value
    return low <= value <= high


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "original", "source_shares": "natural"},
        {"strategy": "cut", "cut_length_tokens": 200},
        {"strategy": "global", "source_shares": "natural"},
        {"long_token_share": 0.8},
        {"long_token_share": 0.95, "train_tokens": 800_000, "source_shares": "natural"},
        {"strategy": "upsample-sources", "upsampled_shares": {"Book": 0.6}},
    ],
)
def test_a_dry_run_tells_what_a_run_makes(changes, config, tmp_path):
    config = with_mixture(config, **changes)
    made = preprocess(config, tmp_path / "out").sources
    found = plan_dataset(config, text_bytes=1 << 17)
    assert 0 < found.read_share < 0.5
    tokens = sum(info.tokens_in for info in made.values())
    for name, info in made.items():
        told = found.expected[name]
        assert holds(told.corpus.documents, info.documents_in)
        assert holds(told.corpus.tokens, info.tokens_in)
        assert holds(told.corpus.share, info.tokens_in / tokens)
        assert holds(told.corpus.long_share, info.long_share_before)
        assert holds(told.tokens_asked, info.tokens_kept)
        assert told.tokens_usable.high > info.tokens_kept
        if config.mixture.strategy == "cut":
            assert told.long_share_after is None
        else:
            assert holds(told.long_share_after, info.long_share_after)
            assert told.long_share_after.high - told.long_share_after.low < 0.4
    assert not any("is refused" in note for note in found.notes)
