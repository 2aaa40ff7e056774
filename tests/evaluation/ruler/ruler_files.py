"""Small files in the formats that RULER's tasks read, and a byte-level tokenizer."""

import json
import random
from pathlib import Path

import tokenizers

from megatron_long.evaluation.ruler.ruler_definitions import KINDS, NEEDLE, NOISE
from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

VOCAB_SIZE = 1500
WORDS = [
    first + last
    for first in ("ba", "co", "du", "fe", "gi", "ho")
    for last in ("ran", "lt", "mmer", "sk", "ne")
]


def write_inputs(folder: Path) -> RulerInputs:
    """Essays, questions in the formats of SQuAD and HotpotQA, and more words than lists need."""
    drawn = random.Random(0)

    def sentence() -> str:
        text = " ".join(drawn.choices(WORDS, k=drawn.randrange(4, 18)))
        return f"{text.capitalize()}{drawn.choice(('.', '.', '?', ' at 5 p.m.', ' by Mr. Hart.'))}"

    def text(number: int) -> str:
        return " ".join(sentence() for _ in range(number))

    essay = "\n\n".join(text(drawn.randrange(2, 9)) for _ in range(60))
    contents = {
        "essays": {"text": essay},
        "squad": {"data": [_article(drawn, text, number) for number in range(30)]},
        "hotpotqa": [_question(drawn, text, number) for number in range(40)],
        "words": {str(number): f"word{number}" for number in range(20_000)},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return RulerInputs(*(folder / f"{name}.json" for name in contents))


def _article(drawn: random.Random, text, number: int) -> dict:
    parts = []
    for part in range(drawn.randrange(1, 6)):
        context = f"Part {part} of {number}. {text(5)}"
        answers = [{"text": context.split()[place]} for place in (1, 3)]
        asked = {"question": f"Which part is {number}.{part}?", "answers": answers}
        impossible = {"question": "None?", "answers": [], "is_impossible": True}
        parts.append({"context": context, "qas": [asked | {"is_impossible": False}, impossible]})
    return {"paragraphs": parts}


def _question(drawn: random.Random, text, number: int) -> dict:
    context = [[f"Title {number} {place}", [text(1), " " + text(2)]] for place in range(10)]
    return {"question": f"Who is {number}?", "answer": f"Title {number}", "context": context}


def save_tokenizer(folder: Path, *markers: str) -> tokenizers.Tokenizer:
    """A tokenizer of bytes and a few merges that adds BOS, as a folder that transformers opens."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    templates = [kind.template + kind.answer_prefix for kind in KINDS.values()]
    tokenizer.train_from_iterator([NOISE, NEEDLE, " ".join(WORDS), *templates] * 9, trainer)
    tokenizer.add_special_tokens(list(markers))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer
