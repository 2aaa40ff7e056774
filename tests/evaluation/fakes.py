"""Models whose answers are known, a word tokenizer, and what a checkpoint folder looks like."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_long.evaluation.batches import TokenScores
from tests.fake_checkpoints import write_fake_checkpoint

CORRECT_LOSS, WRONG_LOSS = 0.25, 5.0


class FakeScorer:
    """A scorer that computes its losses from tokens and labels by a function.

    Data-parallel peers are played by more instances: `gather` gives what `peers` have left, and
    keeps what it was given in `gathered`.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray], np.ndarray],
        context_length: int,
        *,
        rank: int = 0,
        size: int = 1,
        peers: Sequence["FakeScorer"] = (),
    ) -> None:
        self.predict, self.context_length = predict, context_length
        self.data_parallel_rank, self.data_parallel_size = rank, size
        self.is_writer = rank == 0
        self.length_step = 1
        self.peers = peers
        self.gathered: object = None
        self.shapes: list[tuple[int, ...]] = []

    def score(self, tokens: torch.Tensor, labels: torch.Tensor) -> TokenScores:
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.shape == labels.shape
        assert tokens.shape[1] <= self.context_length
        assert tokens.shape[1] % self.length_step == 0
        self.shapes.append(tuple(tokens.shape))
        predicted = torch.from_numpy(np.stack([self.predict(row) for row in tokens.numpy()]))
        is_scored = labels != -1
        is_right = predicted == labels
        losses = torch.where(is_right, CORRECT_LOSS, WRONG_LOSS) * is_scored
        return TokenScores(losses.float(), is_right | ~is_scored)

    def gather(self, value: object) -> list:
        self.gathered = value
        return [*(peer.gathered for peer in self.peers), value]

    def agree(self, value: object) -> object:
        return value

    def close(self) -> None:
        pass


def copy_predictions(tokens: np.ndarray) -> np.ndarray:
    """Predict at each position what followed the last two tokens when they came before.

    That is the induction head a real model needs to find a needle.
    """
    predicted = np.full(len(tokens), -2)
    seen: dict[tuple[int, int], int] = {}
    for place in range(1, len(tokens)):
        pair = int(tokens[place - 1]), int(tokens[place])
        predicted[place] = seen.get(pair, -2)
        if place + 1 < len(tokens):
            seen.setdefault(pair, int(tokens[place + 1]))
    return predicted


def near_copy_predictions(reach: int) -> Callable[[np.ndarray], np.ndarray]:
    """Give a copying model that sees only so many tokens back."""

    def predict(tokens: np.ndarray) -> np.ndarray:
        predicted = np.full(len(tokens), -2)
        for place in range(1, len(tokens)):
            for back in range(place - 1, max(0, place - reach), -1):
                if tokens[back] == tokens[place] and tokens[back - 1] == tokens[place - 1]:
                    predicted[place] = tokens[back + 1]
                    break
        return predicted

    return predict


class WordTokenizer:
    """Words, punctuation and white space are tokens; ids in order of appearance.

    White space before a word belongs to it, as in byte-level BPE.
    """

    kind = "words"
    vocab_size = 10_000
    eod_id = 0
    vocabulary_sha256 = "words"

    def __init__(self, bos_id: int | None = 1) -> None:
        self.bos_id = bos_id
        self._ids = {"</s>": 0, "<s>": 1}

    def encode(self, text: str) -> np.ndarray:
        pieces = re.findall(r"\n| ?[\w']+| ?[^\w\s]|\s", text)
        return np.array([self._ids.setdefault(p, len(self._ids)) for p in pieces], dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        words = list(self._ids)
        return "".join(words[index] for index in ids)


def write_checkpoint_folder(path: Path, vocab_size: int = 10_000) -> Path:
    """Make what the tools look at before the model is loaded."""
    write_fake_checkpoint(path, 10)
    (path / "hf_config.json").write_text(json.dumps(llama_config(vocab_size)))
    return path


def llama_config(vocab_size: int = 10_000, max_positions: int = 1024) -> dict:
    """The config.json of a small Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
    }


def make_story(num_sentences: int) -> str:
    """Give text of plain sentences of different lengths, none twice."""
    rng = np.random.default_rng(7)
    sentences = [
        " ".join(["Sentence", str(number), *(f"w{rng.integers(500)}" for _ in range(number % 9))])
        for number in range(num_sentences)
    ]
    return ". ".join(sentences) + "."
