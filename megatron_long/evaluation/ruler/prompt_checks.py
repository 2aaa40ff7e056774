"""What would make a score say nothing of the model: a foreign chat template, a lost prompt, a cut answer."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.ruler.drawing import Request
from megatron_long.evaluation.ruler.ruler_definitions import (
    CHAT_TEMPLATES,
    OWN_TEMPLATE,
    RulerTask,
)
from megatron_long.evaluation.ruler.ruler_samples import Sample
from megatron_long.job.rendezvous import is_first_process

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

MARKER = re.compile(r"<\|[^|<>\s]+\|>")
PLACE = "{task_template}"

_log = logging.getLogger(__name__)


def choose_template(name: str, tokenizer: Tokenizer, folder: Path | None) -> str:
    """Give a chat template that the tokenizer knows, with `{task_template}` where the task goes.

    Args:
        name: One of `CHAT_TEMPLATES`, or `own`.
        folder: Where the tokenizer's files lie.
    Raises: ConfigError: there is no own template, or the tokenizer does not know the words that mark the
    turns.
    """
    own = None if folder is None else _own_template(folder)
    if name == OWN_TEMPLATE:
        if own is None:
            raise ConfigError(
                f"--template own: {folder} has no chat template; a base model is asked with --template base"
            )
        return own
    template = CHAT_TEMPLATES[name]
    for marker in MARKER.findall(template):
        if len(tokenizer.encode_prompt(marker)) != 1:
            raise ConfigError(
                f"--template {name} marks turns by {marker}, which this tokenizer does not know as one "
                "token, so that the model would read it as text; give its family's template, or base"
            )
    if own is not None and own.split() != template.split() and is_first_process():
        _log.warning(
            "--template %s is not the model's own chat template (%r); --template own asks in that way",
            name,
            own,
        )
    return template


def _own_template(folder: Path) -> str | None:
    from megatron_long.tokenizer.tokenizer_files import has_chat_template, read_config

    folder = folder if folder.is_dir() else folder.parent
    if not has_chat_template(folder, read_config(folder)):
        return None
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        turn = [{"role": "user", "content": PLACE}]
        text = own.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of any kind: a template is a program
        raise ConfigError(
            f"--tokenizer {folder}: its chat template cannot be used ({type(error).__name__}: {error}); "
            "repair it, or remove it from the folder"
        ) from error
    if text.count(PLACE) != 1:
        raise ConfigError(
            f"--tokenizer {folder}: its chat template does not give what a user says as it is ({text[:80]!r})"
        )
    return text


def with_bos(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Give a prompt's token ids, int64, with BOS before them where the model wants one and none is there."""
    tokens = tokens.astype(np.int64)
    if tokenizer.bos_id is not None and tokens[0] != tokenizer.bos_id:
        return np.concatenate([[tokenizer.bos_id], tokens])
    return tokens


def check_sample(sample: Sample, request: Request, tokenizer: Tokenizer) -> None:
    """See that a prompt can be answered.

    Raises: ConfigError: the answer takes more tokens than are generated. DataError: the tokenizer loses it.
    """
    if problem := too_long(sample, request.task, tokenizer, request.tokens_to_generate):
        raise ConfigError(
            f"--tasks {request.name}: {problem}, so no model could be right; give more by "
            "--tokens-to-generate"
        )
    if not request.task.shared.needs_all:
        return  # "yes" stands in no document
    text = tokenizer.decode(sample.tokens).lower()
    if lost := [answer for answer in sample.answers if answer.lower() not in text]:
        raise DataError(
            f"--tasks {request.name}: the prompt holds the answer {lost[0]!r}, and its "
            f"{len(sample.tokens)} tokens do not: the tokenizer cuts the text short or does not know its "
            "characters; give the model's own"
        )


def too_long(sample: Sample, task: RulerTask, tokenizer: Tokenizer, number: int) -> str:
    """Say that so many tokens cannot hold the answer; empty if they can."""
    texts = [" ".join(sample.answers)] if task.shared.needs_all else list(sample.answers)
    shortest = min(len(tokenizer.encode(text)) for text in texts)
    if shortest <= number:
        return ""
    return f"the answer takes {shortest} tokens, and {number} are generated"
