"""RULER's tasks as data: prompt texts, parameters, tokens to generate, scoring, chat templates.

These strings define the benchmark: a changed letter is another task.

Source: NVIDIA/RULER (Apache-2.0; Hsieh et al. 2024, arXiv 2404.06654) at commit c3f5e3b4: texts and tokens of
`scripts/data/synthetic/constants.py`, parameters of `scripts/synthetic.yaml`, scoring of
`scripts/eval/synthetic/constants.py`, chat templates of `scripts/data/template.py`, the threshold of its
README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

THRESHOLD_PERCENT = 85.6
"""Average of Llama-2-7B (chat) at 4K; a length counts as effective if the average reaches it."""
PUBLISHED_SAMPLES = 500
"""Samples a task and length behind RULER's published figures."""
DEFAULT_SEED = 42
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DOCUMENT = "Document {i}:\n{document}"


@dataclass(frozen=True)
class Kind:
    """What the tasks of one generator share."""

    template: str
    answer_prefix: str
    """Begins the answer, after the chat template's end."""
    tokens_to_generate: int
    needs_all: bool = True
    """Whether the score is the share of the answers found; else any of them is enough."""


@dataclass(frozen=True)
class RulerTask:
    """One of the 13."""

    kind: str
    """One of `KINDS`."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Parameters of its generator."""

    @property
    def shared(self) -> Kind:
        """Give what it shares with others of its kind."""
        return KINDS[self.kind]


KINDS = {
    "niah": Kind(
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic "
        "{type_needle_v} for {query} mentioned in the provided text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are",
        128,
    ),
    "vt": Kind(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
        "assigned the value {query}, they are: ",
        30,
    ),
    "cwe": Kind(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
        "ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
        "above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": Kind(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
        "ignore the dots '....'. What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    "qa": Kind(
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the "
        "given documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}",
        " Answer:",
        32,
        needs_all=False,
    ),
}


def _niah(
    haystack: str, keys: int = 1, values: int = 1, queries: int = 1, **types: str
) -> RulerTask:
    """A needle task: kind of haystack, kinds of key and value (`words`, `numbers`, `uuids`), how many."""
    counts = {"num_keys": max(keys, queries), "num_values": values, "num_queries": queries}
    of = {"key_type": "words", "value_type": "numbers"} | types
    return RulerTask("niah", MappingProxyType({"haystack": haystack, **counts, **of}))


RULER_TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value_type="uuids"),
    "niah_multikey_1": _niah("essay", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": _niah("essay", values=4),
    "niah_multiquery": _niah("essay", queries=4),
    "vt": RulerTask("vt", MappingProxyType({"num_hops": 4})),
    "cwe": RulerTask(
        "cwe", MappingProxyType({"num_common": 10, "common_repeats": 30, "uncommon_repeats": 3})
    ),
    "fwe": RulerTask("fwe", MappingProxyType({"alpha": 2.0, "word_length": 6})),
    "qa_1": RulerTask("qa", MappingProxyType({"dataset": "squad"})),
    "qa_2": RulerTask("qa", MappingProxyType({"dataset": "hotpotqa"})),
}

CHAT_TEMPLATES = {
    "base": "{task_template}",
    "meta-chat": "[INST] {task_template} [/INST]",
    "vicuna-chat": "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. USER: {task_template} ASSISTANT:",
    "lwm-chat": "You are a helpful assistant. USER: {task_template} ASSISTANT: ",
    "Phi3": "<|user|>\n{task_template}<|end|>\n<|assistant|>\n",
    "meta-llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
"""Of RULER's, those of Llama-like models."""
OWN_TEMPLATE = "own"
"""The tokenizer's own chat template, in place of one of `CHAT_TEMPLATES`."""
