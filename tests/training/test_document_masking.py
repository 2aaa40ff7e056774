"""Masks between documents: the same losses and gradients whatever the layout, and the right ones."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_long.dataset.packed_dataset import PackedDataset
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError

host_backend.install()

# ruff: noqa: E402
from megatron_long import command_line
from megatron_long.flags.backend import GPU, HOST
from megatron_long.model.document_masks import offsets_of, pad_documents, split_batch

WORKER = Path(__file__).with_name("document_worker.py")
SEQ_LENGTH = 128
DOCUMENTS = (
    *(1, 1, 2, 60, 7, 1, 56),  # the first window, exactly
    *(3 * SEQ_LENGTH + 5,),  # over whole windows, and into the next by 5
    *(13, 1, 1, 1, 33, 90, 2, 5, 64, 100, 11, 17, 21, 8, 40, 75),
)
"""Lengths in tokens; offsets are multiples of nothing."""
EOD = 2  # of the tiny tokenizer
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-5
"""Nats, and the share of a gradient's norm; both FP32."""
STEPS = 2
FLAGS = f"""
--recipe tiny_debug --hidden-size 64 --kv-channels 16 --ffn-hidden-size 128 --padded-vocab-size 512
--num-layers 2 --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --micro-batch-size 1
--global-batch-size 3 --train-iters {STEPS} --lr 2e-3 --min-lr 2e-3 --clip-grad 0 --allow-repeat
--seed 7
""".split()
LAYOUTS = {
    "cp2": (2, "sbhd", "--context-parallel-size 2"),
    "cp4": (4, "sbhd", "--context-parallel-size 4"),
    "packed-cp4": (4, "thd", "--context-parallel-size 4"),
    "packed-tp2-sp-cp2": (4, "thd", "--tensor-model-parallel-size 2 --context-parallel-size 2"),
    "packed-pp2": (2, "thd", "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def dataset(make_dataset) -> Path:
    """Documents of the lengths above, twice over with other tokens."""
    return make_dataset(DOCUMENTS * 2)


@pytest.fixture(scope="module")
def start(tmp_path_factory, run_job, dataset) -> Path:
    """Weights to start from: pipeline stages would draw others."""
    folder = tmp_path_factory.mktemp("start")
    command = ["-m", "megatron_long.pretrain", *FLAGS, "--dataset", dataset, "--lr", "0"]
    run_job(1, [*command, "--min-lr", "0", "--train-iters", "1", "--save", folder])
    return folder


@pytest.fixture(scope="module")
def train(run_job, dataset, start):
    """Give losses of the steps, all records, and gradients of the first step on rank 0."""

    def run(folder: Path, num_processes: int, attention: str, *flags: str) -> tuple:
        command = [WORKER, folder / "gradients.pt", attention, *FLAGS, "--dataset", dataset]
        command += ["--load", start, "--finetune", "--loss-log", folder / "log.jsonl", *flags]
        run_job(num_processes, command)
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        gradients = torch.load(folder / "gradients.pt")
        return [record["lm loss"] for record in records], records, gradients

    return run


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory) -> tuple:
    """One process, documents masked."""
    return train(tmp_path_factory.mktemp("reference"), 1, "sbhd", "--document-masking")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(name, tmp_path, train, reference):
    num_processes, attention, layout = LAYOUTS[name]
    seen = train(tmp_path, num_processes, attention, "--document-masking", *layout.split())
    losses, records, gradients = seen
    difference = max(abs(a - b) for a, b in zip(losses, reference[0], strict=True))
    print(f"{name}: largest difference of a loss {difference:.1e}")
    assert difference <= LOSS_TOLERANCE
    norms = [[record["grad_norm"] for record in run] for run in (records, reference[1])]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    assert all(("padding share" in record) is (attention == "thd") for record in records)
    if "tp2" in name or "pp2" in name:
        return  # rank 0 holds but a part of the gradients
    errors = {
        parameter: float((gradients[parameter] - expected).norm() / expected.norm())
        for parameter, expected in reference[2].items()
    }
    print(f"{name}: largest difference of a gradient {max(errors.values()):.1e} of its norm")
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors


@pytest.mark.slow
def test_masks_matter(tmp_path, train, reference):
    losses, _, gradients = train(tmp_path, 1, "sbhd")
    assert abs(losses[0] - reference[0][0]) > 100 * LOSS_TOLERANCE
    name = "module.decoder.layers.0.self_attention.linear_qkv.weight"
    difference = (gradients[name] - reference[2][name]).norm() / reference[2][name].norm()
    print(f"without masks the gradient differs by {difference:.2f} of its norm")
    assert difference > 10_000 * GRADIENT_TOLERANCE


def windows(dataset: Path) -> list[dict]:
    packed = PackedDataset(dataset / "train", SEQ_LENGTH, mask_documents=True)
    return [packed[index] for index in range(len(packed))]


def test_loss_stays_within_documents(dataset):
    """A label is counted where it belongs to the document of its token, found from the lengths alone."""
    document = np.repeat(np.arange(2 * len(DOCUMENTS)), DOCUMENTS * 2)
    for index, window in enumerate(windows(dataset)):
        first = index * SEQ_LENGTH
        own = document[first : first + SEQ_LENGTH + 1]
        np.testing.assert_array_equal(window["loss_mask"].numpy(), own[1:] == own[:-1])
        offsets = offsets_of(window["document_starts"])
        begins = [0, *(np.flatnonzero(np.diff(own[:-1])) + 1), SEQ_LENGTH]
        assert offsets.tolist() == begins
        is_end = window["tokens"] == EOD
        assert torch.equal(window["loss_mask"] == 0, is_end)  # as --eod-mask-loss does


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (4, 1), (2, 2), (8, 1)])
def test_padded_layout_holds_each_token_once(dataset, cp, tp):
    for window in windows(dataset):
        offsets = offsets_of(window["document_starts"])
        padded = pad_documents(offsets, cp, tp)
        assert not (padded.padded_offsets.diff() % (2 * cp if cp > 1 else 1)).any()
        assert int(padded.padded_offsets[-1]) % (16 * cp * tp) == 0
        assert (padded.padded_offsets.diff() >= offsets.diff()).all()
        rows = torch.cat([padded.shard_rows(rank, cp) for rank in range(cp)])
        assert rows[rows >= 0].sort().values.equal(torch.arange(SEQ_LENGTH))
        assert int((rows < 0).sum()) == padded.num_padding == len(rows) - SEQ_LENGTH


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_shards_are_those_of_transformer_engine(dataset, cp):
    """Against its rule, document by document: chunk r and chunk 2*cp-1-r of each."""
    for window in windows(dataset):
        batch = {name: window[name][None] for name in ("tokens", "labels", "loss_mask")}
        offsets = offsets_of(window["document_starts"])
        ends = pad_documents(offsets, cp).padded_offsets.tolist()
        buffer = {name: torch.zeros(1, ends[-1]) for name in batch}
        for (first, last), place in zip(pairwise(offsets.tolist()), ends, strict=False):
            for name, whole in batch.items():
                buffer[name][:, place : place + last - first] = whole[:, first:last]
        for rank in range(cp):
            shards, packed, num_padding = split_batch(batch, offsets, "thd", rank=rank, cp=cp, tp=1)
            chunks = []
            for begin, end in pairwise(ends):
                size = (end - begin) // (2 * cp) if cp > 1 else 0
                for chunk in (rank, 2 * cp - 1 - rank):
                    chunks.append(torch.arange(begin + chunk * size, begin + (chunk + 1) * size))
                if cp == 1:
                    chunks.append(torch.arange(begin, end))
            index = torch.cat(chunks)
            for name, shard in shards.items():
                assert torch.equal(shard.float(), buffer[name][:, index])
            assert packed.cu_seqlens_q.tolist() == ends
            assert packed.cu_seqlens_q.dtype == torch.int32
            assert max(np.diff(ends)) <= packed.max_seqlen_q <= ends[-1]
            assert num_padding == int((shards["tokens"] == 0).sum())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--dataloader-inter-document-masking"],
            "offsets are those of documents.*give --document",
        ),
        (["--reset-attention-mask"], "64 GiB at 131072 tokens; give --document-masking"),
        (["--reset-position-ids"], "64 GiB at 131072 tokens; give --document-masking"),
        (["--document-masking", "--micro-batch-size", "2"], "--micro-batch-size 2 with --document"),
    ],
)
def test_what_cannot_be_masked_is_refused(flags, words, dataset):
    with pytest.raises(ConfigError, match=words):
        command_line.parse(
            ["--recipe", "tiny_debug", "--dataset", str(dataset), "--allow-repeat", *flags], HOST, 1
        )


def test_masking_needs_our_dataset():
    flags = ["--recipe", "tiny_debug", "--mock-data", "--document-masking"]
    with pytest.raises(ConfigError, match="needs to know where documents begin; give --dataset"):
        command_line.parse(flags, HOST, 1)


def test_the_attention_in_use_decides_the_format(dataset):
    from megatron_long.training import batch

    flags = ["--recipe", "tiny_debug", "--dataset", str(dataset), "--allow-repeat"]
    formats = [
        batch.attention_format(command_line.parse([*flags, *more], backend, 1)[1])
        for backend, more in ((HOST, []), (GPU, []), (GPU, ["--transformer-impl", "local"]))
    ]
    assert formats == ["sbhd", "thd", "sbhd"]
