import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from megatron_long.errors import ConfigError, DataError
from megatron_long.tokenizer.loading import load_tokenizer, separate_documents
from megatron_long.tokenizer.tokenizer_files import copy_tokenizer

TEXTS = ["nana bocu", "  two  spaces", "<s>literal</s> é \U0001f600\n", "", "tab\tand 12345"]


@pytest.fixture(scope="session")
def json_file(model_file, tmp_path_factory):
    """The same vocabulary as `model_file`, as a tokenizer.json with BOS in its post-processor."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for index, piece in enumerate(pieces):
        if not (processor.is_control(index) or processor.is_byte(index) or index == 0):
            cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
            merges += [(index, cut) for cut in known]
    merges.sort(key=lambda item: item[0])
    model = models.BPE(
        vocabulary,
        [cut for _, cut in merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_both_kinds_give_the_same_ids_and_hash(model_file, json_file):
    from_model, from_json = load_tokenizer(model_file), load_tokenizer(json_file)
    assert (from_model.kind, from_json.kind) == ("sentencepiece", "hf")
    for first, second in zip(
        from_model.encode_batch(TEXTS), from_json.encode_batch(TEXTS), strict=True
    ):
        np.testing.assert_array_equal(first, second)
    names = ("vocab_size", "bos_id", "eod_id", "vocabulary_sha256")
    assert [getattr(from_model, name) for name in names] == [
        getattr(from_json, name) for name in names
    ]
    assert (from_model.bos_id, from_model.eod_id) == (1, 2)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_literal_special_tokens_stay_text(kind, model_file, json_file):
    tokenizer = load_tokenizer(model_file if kind == "model" else json_file)
    ids = tokenizer.encode("<s>a</s>")
    assert not {tokenizer.bos_id, tokenizer.eod_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == "<s>a</s>"
    np.testing.assert_array_equal(ids, tokenizer.encode_batch(["<s>a</s>"])[0])


PROMPT = "<|im_start|> This is a story: <book>"


@pytest.mark.parametrize("template", [None, "in the configuration", "in a file"])
@pytest.mark.parametrize("files", ["json", "model and json", "model and added tokens"])
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_special_tokens_of_a_prompt_are_those_of_the_model(
    class_name, files, template, json_file, model_file, tmp_path
):
    """With a chat template they are what transformers makes of them; in other texts never."""
    from transformers import AutoTokenizer

    if files == "model and added tokens" and class_name != "LlamaTokenizer":
        pytest.skip("a class that reads tokenizer.json alone")
    made = tokenizers.Tokenizer.from_file(str(json_file))
    made.add_special_tokens(["<|im_start|>"])
    special = made.token_to_id("<|im_start|>")
    if "json" in files:
        made.save(str(tmp_path / "tokenizer.json"))
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": special}))
    if "model" in files:
        shutil.copy(model_file, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": class_name, "eos_token": "</s>", "bos_token": "<s>"}
    settings["unk_token"] = "<unk>"
    if template == "in the configuration":
        settings["chat_template"] = "{{ messages }}"
    if template == "in a file":
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = AutoTokenizer.from_pretrained(tmp_path)(PROMPT, add_special_tokens=False).input_ids
    assert own[0] == special
    copy_tokenizer(tmp_path, tmp_path / "copy")  # as it lies in a checkpoint
    for engine, folder in (("auto", tmp_path), ("reference", tmp_path / "copy")):
        tokenizer = load_tokenizer(folder, engine)
        assert tokenizer.kind == ("sentencepiece" if "model" in files else "hf")
        ids = tokenizer.encode_prompt(PROMPT).tolist()
        assert (ids == own) == (template is not None)
        assert (special in ids) == (template is not None)
        assert special not in tokenizer.encode(PROMPT).tolist()
        assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT


def test_a_prompt_of_a_folder_that_transformers_cannot_open(json_file, model_file, tmp_path):
    """The JSON file says what its tokens are; without one the message names what is missing."""
    made = tokenizers.Tokenizer.from_file(str(json_file))
    made.add_special_tokens(["<|im_start|>"])
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 500}')
    with pytest.raises(ConfigError, match="cannot open it to encode the special tokens"):
        load_tokenizer(tmp_path).encode_prompt(PROMPT)
    assert load_tokenizer(tmp_path).encode_prompt("no such token").size
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_prompt(PROMPT)[0] == made.token_to_id("<|im_start|>")
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(DataError, match=r"added_tokens\.json"):
        load_tokenizer(tmp_path).encode_prompt(PROMPT)


def test_hash_tells_vocabularies_apart(model_file, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["other words entirely"] * 5),
        model_prefix=str(tmp_path / "other"),
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    other = load_tokenizer(tmp_path / "other.model")
    assert other.vocabulary_sha256 != load_tokenizer(model_file).vocabulary_sha256


def test_bos_follows_configuration(json_file, model_file, tmp_path):
    for file in (json_file, model_file):
        folder = tmp_path / file.suffix[1:]
        folder.mkdir()
        shutil.copy(file, folder)
        (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}', encoding="utf-8")
        assert load_tokenizer(folder).bos_id is None


def test_eod_comes_from_the_configuration(json_file, tmp_path):
    shutil.copy(json_file, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<unk>"}}), encoding="utf-8")
    assert load_tokenizer(tmp_path).eod_id == 0
    config.write_text(json.dumps({"eos_token": "<nope>"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"end-of-document token \(looked for <nope>\)"):
        load_tokenizer(tmp_path)


def test_copy_loads_alone_and_equal(model_file, json_file, tmp_path):
    for file in (model_file, json_file):
        folder = tmp_path / file.suffix[1:]
        copy_tokenizer(file, folder)
        assert load_tokenizer(folder).vocabulary_sha256 == load_tokenizer(file).vocabulary_sha256


def test_missing_and_damaged_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match=r"--tokenizer .*none\.model: no tokenizer there"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ConfigError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="is neither a SentencePiece model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json cannot be loaded"):
        load_tokenizer(tmp_path / "x.json")


def test_a_special_token_can_end_documents_instead(model_file, json_file):
    for path, separator in ((model_file, "<s>"), (json_file, "<s>")):
        tokenizer = load_tokenizer(path, "reference")
        before = tokenizer.bos_id, tokenizer.eod_id
        separate_documents(tokenizer, path, None)
        assert (tokenizer.bos_id, tokenizer.eod_id) == before
        separate_documents(tokenizer, path, separator)
        assert (tokenizer.bos_id, tokenizer.eod_id) == (None, before[0])
        for other in ("<|none|>", "a"):  # what text gives does not tell where a document ends
            with pytest.raises(
                ConfigError, match=r"is no special token .*; give one of <.*s>, </s>"
            ):
                separate_documents(tokenizer, path, other)
