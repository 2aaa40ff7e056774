from pathlib import Path

from megatron_long.corpus.corpus_sample import SAMPLE_FILES, TEXT_CHARS_PER_FILE, sample_texts
from megatron_long.corpus.documents import RecordKeys
from megatron_long.corpus.listing import find_inputs
from megatron_long.dataset.manifest import read_manifest
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.tokenizer.engines import SAMPLE_BYTES


def test_texts_of_every_file_of_a_small_corpus(corpus, records):
    texts = list(sample_texts(find_inputs([corpus]), RecordKeys()))
    assert texts == [record["text"] for record in records]


def test_a_large_corpus_is_sampled_evenly(tmp_path, write_jsonl):
    for number in range(64):
        rows = [{"text": f"{number} " + "word " * 5000, "source": "Book"}] * 20
        write_jsonl(tmp_path / f"{number:02d}.jsonl", rows)
    texts = list(sample_texts(find_inputs([tmp_path]), RecordKeys()))
    assert sorted({int(text.split()[0]) for text in texts}) == list(range(0, 64, 4))
    taken = sum(map(len, texts))
    assert SAMPLE_BYTES <= taken + 1 <= 2 * SAMPLE_FILES * TEXT_CHARS_PER_FILE


def test_damaged_files_and_lines_are_passed_over(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "good", "source": "Book"}, {"none": 1}])
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstandard")
    assert list(sample_texts(find_inputs([tmp_path]), RecordKeys())) == ["good"]


def test_an_engine_that_fails_on_the_corpus_is_not_used(corpus, model_file, tmp_path, monkeypatch):
    """The hard strings do not show it, the corpus does; the tokens are the reference's."""
    from megatron_long.tokenizer.engines import ENGINES, TuetokenEngine

    class Wrong(TuetokenEngine):
        def encode_flat(self, texts):
            tokens, lengths = super().encode_flat(texts)
            return (tokens[::-1].copy() if "599 " in "".join(texts) else tokens), lengths

    config = PreprocessConfig(
        inputs=[corpus],
        tokenizer=model_file,
        mixture=Mixture(train_tokens=5000, long_threshold_tokens=300, valid_tokens_per_source=1000),
    )
    expected = preprocess(config, tmp_path / "expected")
    monkeypatch.setitem(ENGINES, "gigatoken", Wrong)
    found = preprocess(config, tmp_path / "found")
    assert found.fingerprint == expected.fingerprint
    assert expected.made_by["engine"] == "gigatoken"
    assert found.made_by["engine"] == "tuetoken"
    notes = read_manifest(Path(tmp_path / "found")).made_by["engine_notes"]
    assert "gigatoken is not used: on the corpus it differs from sentencepiece" in notes
