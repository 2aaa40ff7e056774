"""The peers of benchmarks/preprocess.py, one command each.

    python benchmarks/preprocess_peers.py NAME --input FILE --tokenizer FILE --output FOLDER

Every peer writes FOLDER/out.bin and FOLDER/out.idx in reading order, EOD after each document.
`engine` and `reference` use texts already in memory and print only the time of tokenizing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

BATCH_BYTES = 4 << 20
"""Text that the engines get per call, as in preprocessing."""


def megatron_core(input_file: Path, tokenizer: Path, output: Path) -> None:
    """Do what Megatron-LM's tools/preprocess_data.py does, in one process.

    Its pool of workers is omitted: with one core it only adds the cost of sending documents.
    Source: Megatron-LM, tools/preprocess_data.py, Encoder.encode and Partition.process_json_file.
    """
    from megatron.core.datasets import indexed_dataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    parser = _add_tokenizer_args(argparse.ArgumentParser())
    args = parser.parse_args(
        ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    )
    # Dummy values, as in the script.
    args.rank, args.make_vocab_size_divisible_by = 1, 128
    args.tensor_model_parallel_size, args.vocab_extra_ids = 1, 0
    built = build_tokenizer(args)
    dtype = indexed_dataset.DType.optimal_dtype(built.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(output / "out.bin"), dtype=dtype)
    with open(input_file, encoding="utf-8") as lines:
        for line in lines:
            ids = built.tokenize(json.loads(line)["text"])
            if ids:
                ids.append(built.eod)
                builder.add_document(ids, [len(ids)])
    builder.finalize(str(output / "out.idx"))


def datatrove(input_file: Path, tokenizer: Path, output: Path) -> None:
    """Run datatrove's reader and MegatronDocumentTokenizer with one worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    plain, eos = _plain_json(tokenizer)
    (output / "tokenizer.json").write_text(plain, encoding="utf-8")
    writer = MegatronDocumentTokenizer(
        str(output),
        save_filename="datatrove",
        tokenizer_name_or_path=str(output / "tokenizer.json"),
        eos_token=eos,
        batch_size=1000,
    )
    reader = JsonlReader(str(input_file.parent), glob_pattern=input_file.name)
    logs = str(output / "logs")
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=logs).run()
    for suffix in ("bin", "idx"):
        (output / f"datatrove_00000_tokens.{suffix}").rename(output / f"out.{suffix}")


def engine(input_file: Path, tokenizer: Path, output: Path) -> None:
    """Time only the fast engine."""
    _time_engine("auto", input_file, tokenizer, output)


def engine_batch(input_file: Path, tokenizer: Path, output: Path) -> None:
    """Time gigatoken through its `encode_batch`, which starts each batch with an empty cache."""
    import numpy as np

    from megatron_long.tokenizer import engines
    from megatron_long.tokenizer.tokenizer_types import TokensAndLengths

    class BatchEngine(engines.GigatokenEngine):
        def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
            if self._has_no_prefix:
                texts = [" " + text if text else text for text in texts]
            layout = self._engine.encode_batch(list(texts), parallel=False).layout
            offsets = np.asarray(layout.offsets.data)
            tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
            return tokens.view(np.int32), np.diff(offsets)

    engines.ENGINES["gigatoken"] = BatchEngine
    _time_engine("gigatoken", input_file, tokenizer, output)


def reference(input_file: Path, tokenizer: Path, output: Path) -> None:
    """Time only the package that the tokenizer belongs to."""
    _time_engine("reference", input_file, tokenizer, output)


PEERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "megatron_core": megatron_core,
    "datatrove": datatrove,
    "engine": engine,
    "engine_batch": engine_batch,
    "reference": reference,
}


def _time_engine(name: str, input_file: Path, tokenizer: Path, output: Path) -> None:
    import numpy as np
    import orjson

    from megatron_long.dataset.indexed import IndexedDatasetWriter, token_dtype
    from megatron_long.tokenizer.loading import load_tokenizer
    from megatron_long.tokenizer.tokenizer_types import split_flat

    opened = load_tokenizer(tokenizer, name)
    with open(input_file, "rb") as lines:
        texts = [orjson.loads(line)["text"] for line in lines]
    batches, cpu_s = list(_batches(texts)), 0.0
    eod = np.array([opened.eod_id], np.int32)
    with IndexedDatasetWriter(output / "out", token_dtype(opened.vocab_size)) as writer:
        for batch in batches:
            start = time.process_time()
            tokens, lengths = opened.encode_flat(batch)
            cpu_s += time.process_time() - start
            # Written at once: tokens kept in memory would look like growth of the engine.
            for ids in split_flat(tokens, lengths):
                writer.add_document(np.concatenate([ids, eod]))
        writer.finalize()
    told = {"cpu_s": cpu_s, "engine": opened.engine_name, "version": opened.engine_version}
    print(json.dumps(told | {"bos_id": opened.bos_id, "eod_id": opened.eod_id}))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_hf_folder(tokenizer: Path, folder: Path) -> None:
    """Write a tokenizer as a Hugging Face folder, with its special tokens as added tokens."""
    plain, eos = _plain_json(tokenizer)
    content = json.loads(plain)
    if not content["added_tokens"]:
        names = [name for name in ("<unk>", "<s>", eos) if name in content["model"]["vocab"]]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] = [
            {"id": content["model"]["vocab"][name], "content": name, "special": True, **flags}
            for name in names
        ]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _plain_json(tokenizer: Path) -> tuple[str, str]:
    """Return a tokenizer.json, and its EOD token; special tokens remain only if they are not pieces."""
    from megatron_long.tokenizer.engines import plain_json
    from megatron_long.tokenizer.loading import open_reference
    from megatron_long.tokenizer.tokenizer_files import tokenizer_file

    opened = open_reference(tokenizer_file(tokenizer))
    text, added = plain_json(opened), json.loads(opened.to_json()).get("added_tokens") or []
    for token in added:
        if (
            token["id"] == opened.eod_id
            and token["content"] not in json.loads(text)["model"]["vocab"]
        ):
            content = json.loads(text) | {"added_tokens": added}
            return json.dumps(content, ensure_ascii=False), token["content"]
    pieces = json.loads(text)["model"]["vocab"]
    return text, next(piece for piece, index in pieces.items() if index == opened.eod_id)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    for name in ("--input", "--tokenizer", "--output"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    PEERS[args.peer](args.input, args.tokenizer, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
