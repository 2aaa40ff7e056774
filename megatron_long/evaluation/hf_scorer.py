"""A Hugging Face folder as a scorer: the same scores by `transformers`, and true generation.

It stands next to `megatron_long.evaluation.scoring` to check it, and to generate with a key-value cache. One
process holds the whole model; under torchrun every process has a copy and they share the rows.

Legend: b batch, s sequence, h hidden, v vocabulary.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import TokenScores
from megatron_long.job.rendezvous import share
from megatron_long.model.labels import UNSCORED
from megatron_long.pickles import UnpicklingError, guard_checkpoints

POSITIONS_PER_CHUNK = 1024
"""Positions whose logits exist at a time: half a GiB for a vocabulary of 128K."""


class HFScorer:
    """A model of `transformers` behind the interface of `megatron_long.evaluation.batches.TokenScorer`.

    Args:
        model: A causal language model with `model` (giving hidden states) and `lm_head`.
        context_length: Longest row, tokens.
    """

    length_step = 1

    def __init__(self, model: Any, *, context_length: int) -> None:
        self.model = model
        self.context_length = context_length
        self.data_parallel_rank, self.data_parallel_size = share()
        self.is_writer = self.data_parallel_rank == 0
        self.stop_ids: set[int] = set()
        """Tokens that end an answer, besides those that the model's settings name."""

    def score(self, tokens: Tensor, labels: Tensor) -> TokenScores:
        """Score a batch of tokens and labels [b, s]; see `Scorer.score`."""
        device = self.model.device
        asked = labels.to(device) != UNSCORED
        losses = torch.zeros(labels.shape, device=device)
        is_greedy = torch.ones(labels.shape, dtype=torch.bool, device=device)
        with torch.no_grad():
            hidden = self.model.model(tokens.to(device), use_cache=False).last_hidden_state[asked]
            wanted = labels.to(device)[asked]
            parts = [
                _score_chunk(self.model.lm_head(part).float(), wanted_part)
                for part, wanted_part in zip(
                    hidden.split(POSITIONS_PER_CHUNK),
                    wanted.split(POSITIONS_PER_CHUNK),
                    strict=True,
                )
            ]
        losses[asked] = torch.cat([part[0] for part in parts])
        is_greedy[asked] = torch.cat([part[1] for part in parts])
        return TokenScores(losses.cpu(), is_greedy.cpu())

    def generate(self, tokens: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """Give the tokens that greedy decoding adds to a prompt [n]."""
        prompt = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(self.model.device)
        whole = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=_greedy(self.model, max_new_tokens, self._ends()),
        )
        return whole[0, prompt.size(1) :].cpu().numpy()

    def generate_rows(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
        """Give the tokens added to each prompt, without the one that ends it.

        One prompt at a time: padding would want a mask of the square of the length.
        """
        ends = self._ends()
        return [until_stop(self.generate(prompt, max_new_tokens), ends) for prompt in prompts]

    def _ends(self) -> set[int]:
        own = self.model.generation_config
        named = (self.model.config if own is None else own).eos_token_id
        ends = named if isinstance(named, list) else [] if named is None else [named]
        return self.stop_ids | set(ends)

    def gather(self, value: Any) -> list:
        """Collect a picklable object from every process, on each."""
        if self.data_parallel_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.data_parallel_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def agree(self, value: Any) -> Any:
        """Give every process the value of the first one."""
        if self.data_parallel_size == 1:
            return value
        shared = [value]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def close(self) -> None:
        """End the job."""
        if self.data_parallel_size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def until_stop(tokens: np.ndarray, stop_ids: Iterable[int]) -> np.ndarray:
    """Cut an answer before the token that ends it.

    >>> until_stop(np.array([5, 2, 7]), {2, 9}).tolist()
    [5]
    """
    (ends,) = np.nonzero(np.isin(tokens, list(stop_ids)))
    return tokens[: ends[0]] if len(ends) else tokens


def _greedy(model: Any, max_new_tokens: int, ends: Iterable[int]) -> Any:
    """Plain greedy decoding; of the model's own settings (penalties!) only its ends hold."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    # `generate` takes from the model's settings whatever is None in those it is given.
    model.generation_config = greedy
    return greedy


def _score_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(-1) == labels


def _register_attention() -> str:
    """Give `transformers` an attention whose memory does not grow with the square of the length in FP32.

    Its own asks PyTorch for grouped heads, for which no kernel takes FP32 on GPUs: all weights of a layer
    would be there at once, 600 GiB for nine heads at 128K tokens.

    Returns: Its name, for `attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "sdpa_repeated_heads"
    AttentionInterface.register(name, _attend_with_repeated_heads)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attend_with_repeated_heads(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Query [b, heads, s, d] over key and value [b, groups, t, d]; gives [b, s, heads, d]."""
    repeats = query.size(1) // key.size(1)
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeats, dim=1),
        value.repeat_interleave(repeats, dim=1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and query.size(2) > 1,
        scale=scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def open_hf_scorer(
    folder: Path,
    *,
    context_length: int,
    precision: str | None = None,
    random_weights: bool = False,
) -> HFScorer:
    """Load a Hugging Face folder, whole, on this process's device.

    Args:
        precision: `bf16` or `fp32`; None is bf16 on GPUs, fp32 on the host.
        random_weights: Take the folder's config.json alone, with weights as initialised.
    Raises: ConfigError: there is no such model.
    """
    import transformers

    guard_checkpoints()  # of a folder with pickled weights, tensors alone are read
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if share()[1] > 1:
        # Objects of a few KB travel between processes: the host's network is fast enough.
        torch.distributed.init_process_group("gloo")
    precision = precision or ("bf16" if cuda else "fp32")
    own_code: dict[str, Any] = {"trust_remote_code": False}
    how: dict[str, Any] = {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    if precision == "fp32":
        how["attn_implementation"] = _register_attention()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **own_code)
        if random_weights:
            with torch.device(device):
                model = transformers.AutoModelForCausalLM.from_config(config, **own_code, **how)
        else:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **own_code, **how
            )
            _check_complete(folder, found["missing_keys"])
    except (OSError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ConfigError(
            f"--checkpoint {folder} is not a model that transformers can read ({error}); give a folder "
            "of tools/convert_checkpoint.py megatron-to-hf, or another with config.json and weights"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"--checkpoint {folder} holds tensors of other shapes than its config.json makes them (see the "
            "report of transformers above); download the model again"
        ) from error
    return HFScorer(model.to(device).eval(), context_length=context_length)


def _check_complete(folder: Path, missing: Iterable[str]) -> None:
    if names := sorted(missing):
        raise ConfigError(
            f"--checkpoint {folder} lacks {len(names)} tensors ({', '.join(names[:3])}), which transformers "
            "would fill with random numbers; download the model again"
        )
