"""Budgets that are too large: told before work where bytes prove it, else with a number that works."""

import dataclasses
import re
from fractions import Fraction

import numpy as np
import orjson
import pytest

from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import ConfigError
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.supply import TooLittle
from megatron_long.preprocess import preprocess as preprocess_module
from megatron_long.preprocess import survey as survey_module
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.stages import TokenizeStage, WriteStage
from tests.corpus_fixtures import files_of
from tests.preprocess.test_resume import Killed, kill_after

SEEDS = (2, 12)
"""With the first, a run with other limits estimates other shares, of which the number would not hold."""


@pytest.fixture
def config(corpus, model_file):
    mixture = Mixture(
        train_tokens=10**6,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=1000,
    )
    return PreprocessConfig(
        inputs=[corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )


def with_mixture(config, **changes):
    return dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, **changes))


def too_little(config, output):
    with pytest.raises(TooLittle) as failure:
        preprocess(config, output)
    return str(failure.value), int(
        re.search(r"at most --train-tokens (\d+)", str(failure.value))[1]
    )


def test_the_budget_of_the_message_works_at_once_and_on_the_work_that_was_kept(
    config, tmp_path, monkeypatch
):
    message, most = too_little(config, tmp_path / "out")
    assert message.startswith("--train-tokens 1M is more than the corpus can fill")
    assert message.endswith(f"; what was tokenized is kept for that in {tmp_path / 'out.work'}")
    above = int(1.03 * most)
    assert too_little(with_mixture(config, train_tokens=above), tmp_path / "out")[1] == most
    fitting = with_mixture(config, train_tokens=most)
    with monkeypatch.context() as patch:
        tokenized = kill_after(patch, TokenizeStage, 10**6)
        assert preprocess(fitting, tmp_path / "out").train.num_tokens == most
    assert tokenized == []
    preprocess(fitting, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


@pytest.mark.parametrize(
    "changes",
    [
        {"short_keep_ratio": 0.9},
        {"long_token_share": 0.5},
        {"allow_repeat": 40},
        {"valid_tokens_per_source": 300},
        {"source_shares": {"Book": 0.2, "C4": 0.8, "GitHub": 0.0}},
    ],
)
def test_other_remedies_use_the_same_tokens(changes, config, tmp_path, monkeypatch):
    too_little(config, tmp_path / "out")
    tokens = 500_000 if "allow_repeat" in changes else 8000
    other = with_mixture(config, train_tokens=tokens, **changes)
    with monkeypatch.context() as patch:
        tokenized = kill_after(patch, TokenizeStage, 10**6)
        preprocess(other, tmp_path / "out")
    assert tokenized == []
    preprocess(other, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_parts_of_another_budget_are_not_taken(config, tmp_path, monkeypatch):
    """Killed after its parts were written, and started again with another budget, which is killed as well."""
    for tokens, stage in ((9000, "copy_tokenizer"), (8000, "copy_tokenizer")):
        with monkeypatch.context() as patch:
            patch.setattr(preprocess_module, stage, kill)
            with pytest.raises(Killed):
                preprocess(with_mixture(config, train_tokens=tokens), tmp_path / "out")
        assert WriteStage(tmp_path / "out.work").is_done(0)
    resumed = with_mixture(config, train_tokens=8000)
    preprocess(resumed, tmp_path / "out")
    preprocess(resumed, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def kill(*arguments):
    raise Killed


def write_random_sources(folder, seed):
    """Write 1,000 documents in four files, of three to six sources with 2% to 50% long documents."""
    generator = np.random.default_rng(seed)
    words = np.array(["bocu", "dofa", "nulo", "rite", "sapo", "meg", "lin", "ta"])
    count = generator.integers(3, 7)
    long_shares, sizes = generator.uniform(0.02, 0.5, count), generator.dirichlet(np.ones(count))
    folder.mkdir()
    for file in range(4):
        lines = []
        for number in range(250):
            source = generator.choice(count, p=sizes)
            is_long = generator.random() < long_shares[source]
            length = generator.integers(300, 900) if is_long else generator.integers(5, 100)
            text = " ".join([str(number), *generator.choice(words, length)])
            lines.append(orjson.dumps({"text": text, "source": f"s{source}"}))
        (folder / f"{file}.jsonl").write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_budget_of_the_message_works_after_a_survey(seed, config, tmp_path, monkeypatch):
    """Limits differ from budget to budget, and so do estimates of natural shares; the number holds."""
    monkeypatch.setattr(survey_module, "SURVEY_FROM_BYTES", 0)
    monkeypatch.setattr(survey_module, "SURVEY_TEXT_BYTES", 1 << 17)
    monkeypatch.setattr(survey_module, "MIN_DOCUMENTS", 20)
    write_random_sources(tmp_path / "in", seed)
    config = dataclasses.replace(config, inputs=[tmp_path / "in"], engine="auto")
    config = with_mixture(config, long_threshold_tokens=500, short_keep_ratio=0.1)
    _, most = too_little(with_mixture(config, train_tokens=400_000), tmp_path / "out")
    for name in ("out", "fresh"):
        manifest = preprocess(with_mixture(config, train_tokens=most), tmp_path / name)
        assert manifest.train.num_tokens == most
    too_little(with_mixture(config, train_tokens=int(1.03 * most)), tmp_path / "more")


def refused(config, output):
    with pytest.raises(ConfigError, match="is more than the corpus can hold") as failure:
        preprocess(config, output)
    return str(failure.value)


def write_texts(folder, texts):
    """Write lines as short as they can be; return their bytes."""
    folder.mkdir()
    content = b"\n".join(orjson.dumps({"text": text, "source": "s"}) for text in texts)
    (folder / "a.jsonl").write_bytes(content)
    return len(content)


def test_what_bytes_prove_is_told_before_any_work(config, tmp_path, monkeypatch):
    size_bytes = write_texts(tmp_path / "in", ["bocu dofa"] * 1000)
    config = dataclasses.replace(config, inputs=[tmp_path / "in"])
    kill_after(monkeypatch, TokenizeStage, 0)
    message = refused(with_mixture(config, train_tokens=5 * 10**9), tmp_path / "out")
    assert message.startswith(
        "--train-tokens 5B is more than the corpus can hold: its files have at"
    )
    assert f"{size_bytes:,} bytes of text, so at most {size_bytes:,} tokens" in message
    refused(with_mixture(config, train_tokens=3 * size_bytes + 1, allow_repeat=3), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(Killed):  # not proven: the work begins
        preprocess(with_mixture(config, train_tokens=size_bytes), tmp_path / "out")
    before = files_of(tmp_path / "out.work")
    refused(with_mixture(config, train_tokens=size_bytes + 1), tmp_path / "out")
    assert files_of(tmp_path / "out.work") == before


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cut_length", [None, 3, 7])
def test_no_corpus_has_more_tokens_than_its_bytes_prove(
    cut_length, seed, config, tmp_path, model_file
):
    """Texts of bytes that the vocabulary lacks, of special tokens, of nothing, of one character."""
    generator = np.random.default_rng(seed)
    odd = [
        "\x01",
        "é",
        "日",
        "😀",
        "<s>",
        "</s>",
        "<0x41>",
        "▁",
        " ",
        "a",
        "\n",
        '"',
        "bocu",
    ]
    texts = ["".join(generator.choice(odd, generator.integers(0, 9))) for _ in range(2000)]
    size_bytes = write_texts(tmp_path / "in", texts)
    strategy = (
        {"strategy": "cut", "cut_length_tokens": cut_length}
        if cut_length
        else {"strategy": "original"}
    )
    mixture = Mixture(train_tokens=1, valid_tokens_per_source=0, **strategy)
    config = dataclasses.replace(config, inputs=[tmp_path / "in"], mixture=mixture)
    pieces = Fraction(cut_length, cut_length - 2) if cut_length else 1
    proven = int(size_bytes * pieces)
    _, most = too_little(with_mixture(config, train_tokens=proven), tmp_path / "out")
    assert most <= proven
    refused(with_mixture(config, train_tokens=proven + 1), tmp_path / "out")


@pytest.mark.parametrize(("suffix", "most"), [(".gz", 1032), (".zst", 2**15)])
def test_compressed_files_unpack_to_no_more_than_is_assumed(
    suffix, most, config, tmp_path, write_jsonl
):
    texts = [{"text": "a" * 50_000_000, "source": "s"}]
    path = write_jsonl(tmp_path / "in" / f"a.jsonl{suffix}", texts)
    assert most * path.stat().st_size > 50_000_000
    config = dataclasses.replace(config, inputs=[tmp_path / "in"])
    refused(with_mixture(config, train_tokens=most * path.stat().st_size + 1), tmp_path / "out")


def test_where_no_bound_is_known_nothing_is_refused(config, monkeypatch, corpus, tmp_path):
    from megatron_long.preprocess import preprocess_config

    monkeypatch.setattr(preprocess_config, "extra_tokens_bound", lambda path: None)
    too_little(with_mixture(config, train_tokens=10**15), tmp_path / "out")


def test_one_short_document_does_not_stop_a_corpus(config, corpus, records, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "in" / "a.jsonl", [*records, {"text": "bocu dofa", "source": "tiny"}])
    config = dataclasses.replace(config, inputs=[tmp_path / "in"])
    for seed in range(4):
        manifest = preprocess(
            dataclasses.replace(with_mixture(config, train_tokens=9000), seed=seed),
            tmp_path / str(seed),
        )
        assert manifest.train.num_tokens == 9000
        assert "tiny" not in manifest.valid
        left_out = [text for text in manifest.warnings if "tiny: left out of the mixture" in text]
        assert len(left_out) == (manifest.sources["tiny"].documents_kept == 0)
        assert read_manifest(tmp_path / str(seed)) == manifest
