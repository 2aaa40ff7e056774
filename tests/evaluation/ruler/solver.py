"""A model that reads its prompt as text and knows RULER's tasks; its twin says what is near the answer."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


class Solver:
    """Answers as `ShardGenerator` does; `context_length` is the longest prompt and answer it takes."""

    length_step = 1
    data_parallel_rank, data_parallel_size, is_writer = 0, 1, True

    def __init__(
        self, tokenizer, context_length: int, *, is_corrupted: bool = False, says=None
    ) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.is_corrupted, self.says = is_corrupted, says
        self.num_prompts = 0

    def generate_rows(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
        assert max(len(prompt) for prompt in prompts) + max_new_tokens <= self.context_length + 1
        self.num_prompts += len(prompts)
        said = [self._answer(self.tokenizer.decode(prompt)) for prompt in prompts]
        return [np.asarray(self.tokenizer.encode(text))[:max_new_tokens] for text in said]

    def gather(self, value: object) -> list:
        return [value]

    def agree(self, value: object) -> object:
        return value

    def close(self) -> None:
        pass

    def _answer(self, prompt: str) -> str:
        if self.says is not None:
            return self.says
        words = next(
            found for read in (needles, variables, common, coded) if (found := read(prompt))
        )
        if self.is_corrupted:
            words = [f"{word[0]}#{word[2:]}" for word in words]
        return " " + " ".join(words)


def needles(prompt: str) -> list[str]:
    """Values of the keys that the question names."""
    hidden = re.findall(r"special magic \w+ for (.+?) is: (.+?)\.", prompt)
    asked = re.findall(r"special magic \w+ for (.+?) mentioned in the provided text", prompt)
    if not asked:
        return []
    keys = re.split(r", and |, ", asked[-1])
    return [value for key, value in hidden if key in keys]


def variables(prompt: str) -> list[str]:
    """Variables that hold the value of the last question, in the text after the example."""
    asked = re.findall(r"assigned the value (\d+)", prompt)
    if not asked:
        return []
    own = prompt[prompt.rindex("Memorize and track") :]
    held = {asked[-1]}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", own):
        if value in held:
            held.add(name)
    return sorted(held - {asked[-1]})


def common(prompt: str) -> list[str]:
    """The ten words that come most often in the last list."""
    if "most common words" not in prompt:
        return []
    listed = prompt[prompt.rindex("Below is a numbered") :].split("\nQuestion:")[0]
    words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed.split("\n", 1)[1])
    return [word for word, _ in Counter(words).most_common(10)]


def coded(prompt: str) -> list[str]:
    """The three coded words that come most often."""
    text = prompt.split("coded words. ")[1].split("\nQuestion:")[0]
    return [word for word, _ in Counter(text.split()).most_common(4) if word != "..."][:3]
