"""The RoPE and context to train a model with, from the flags of a conversion."""

from dataclasses import dataclass, replace

from megatron_long.errors import ConfigError
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.rope_stretch import stretch_rope


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What to change; None leaves the model's own."""

    rope_theta: float | None = None
    rope_method: str | None = None
    rope_factor: float | None = None
    rope_original_length: int | None = None
    context_length: int | None = None
    """Longest context after training, in tokens."""

    def apply(self, model: LlamaGeometry) -> LlamaGeometry:
        """Return the model as it is to be trained.

        Raises: ConfigError: flags that do not go together, or a stretch that is too small.
        """
        if self.rope_theta is not None:
            model = replace(model, rotary_base=float(self.rope_theta))
        if self.context_length is not None:
            if self.context_length < 1:
                raise ConfigError(f"--context-length {self.context_length} must be 1 or more")
            longer = self.context_length
        else:
            longer = model.max_position_embeddings
        if self.rope_method is None:
            if self.rope_factor is not None or self.rope_original_length is not None:
                raise ConfigError(
                    "--rope-factor and --rope-original-length belong to --rope-method linear, yarn or "
                    "llama3; give that too"
                )
            return replace(model, max_position_embeddings=longer)
        if self.context_length is None and self.rope_method != "base":
            if self.rope_factor is None:
                raise ConfigError(
                    f"--rope-method {self.rope_method} needs --context-length, the tokens to reach, or "
                    "--rope-factor"
                )
            original = self.rope_original_length or model.rope.original_length(longer)
            longer = round(self.rope_factor * original)
        stretched = stretch_rope(
            model, longer, self.rope_method, self.rope_factor, self.rope_original_length
        )
        return replace(stretched, max_position_embeddings=longer)
