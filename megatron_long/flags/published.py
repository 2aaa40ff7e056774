"""Published long-context recipes as the two commands of each of their stages: data, then training.

A value without a flag here is not known, or has no flag: `notes` says so. Flags come on top of a recipe of
`flags.recipe`, which gives the layout, the precision and what all of them share (Adam with betas 0.9 and
0.95, weight decay 0.1, gradient clipping 1.0).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_long.errors import ConfigError
from megatron_long.flags.recipe import RECIPES, K, windows_of

BASE = "llama3_8b_128k"
PROLONG = "github.com/princeton-nlp/ProLong, commit 907dcf4"
SMOLLM = "github.com/huggingface/smollm, commit a041759, text/pretraining/smollm3"
OLMO = "github.com/allenai/OLMo-core, src/scripts/official/OLMo3"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run over one dataset."""

    seq_length: int | None
    """Tokens of a window; None for that of the base recipe."""
    train_tokens: int
    tokens_per_batch: int | None = None
    """Tokens of an optimizer step; None if it is not known: then that of the base recipe."""
    rope: Mapping[str, object] = field(default_factory=dict)
    """Flags of RoPE."""
    schedule: Mapping[str, object] = field(default_factory=dict)
    """Flags of the learning rate; none if it is not known: then that of the base recipe."""
    masks_documents: bool = False
    keeps_optimizer: bool = True
    """Of the stage before, if there is one."""
    data: tuple[str, ...] = ()
    """Flags of `megatron-long preprocess`."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Share of each source, for a YAML file of `--source-shares`."""

    def data_argv(self) -> list[str]:
        """Flags of the mixture; one token more than windows hold, because the last one needs a label."""
        tokens = self.num_windows * self.seq_length + 1 if self.seq_length else self.train_tokens
        return ["--train-tokens", str(tokens), *self.data]

    def training_argv(self) -> list[str]:
        """Flags of training, but for the start and the dataset."""
        values: dict[str, object] = {}
        if self.seq_length:
            values["--seq-length"] = self.seq_length
            if self.tokens_per_batch:
                values["--global-batch-size"] = self.tokens_per_batch // self.seq_length
                values["--train-iters"] = self.train_tokens // self.tokens_per_batch
            else:
                values["--train-samples"] = self.num_windows
        values |= {**self.rope, **self.schedule}
        words = [str(word) for pair in values.items() for word in pair]
        return [*words, *(["--document-masking"] if self.masks_documents else [])]

    @property
    def num_windows(self) -> int:
        """Windows of the run, in whole steps if the batch is known."""
        assert self.seq_length
        step = self.tokens_per_batch or self.seq_length
        return self.train_tokens // step * step // self.seq_length


@dataclass(frozen=True, kw_only=True)
class Published:
    """A recipe, with its source."""

    title: str
    start: str
    """The model that it starts from."""
    sources: tuple[str, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    """What has no flag here, or could not be read."""
    base: str = BASE

    def with_tokens(self, train_tokens: int) -> "Published":
        """Return the same recipe with this many tokens in each stage, and warm-ups of the same share of it.

        Raises: ConfigError: fewer than a step takes.
        """
        base = RECIPES[self.base]()
        stages = []
        for number, stage in enumerate(self.stages, 1):
            length = stage.seq_length or base.seq_length
            step = stage.tokens_per_batch or windows_of(base.tokens_per_batch, length) * length
            if train_tokens < step:
                raise ConfigError(
                    f"--train-tokens {train_tokens} is less than the {step:,} tokens of a step in stage "
                    f"{number} of {self.title}; give at least {step}"
                )
            schedule = dict(stage.schedule)
            if warmup := schedule.get("--lr-warmup-iters"):
                steps = int(str(warmup)) * (train_tokens // step) // (stage.train_tokens // step)
                schedule["--lr-warmup-iters"] = steps
            stages.append(
                replace(stage, seq_length=length, train_tokens=train_tokens, schedule=schedule)
            )
        return replace(self, stages=tuple(stages))


def paper() -> Published:
    """Fu et al. 2024: 80K, length upsampling within each source."""
    return Published(
        title="Fu et al. 2024",
        start="Llama-2-7B",
        sources=(
            "arXiv 2402.10171, sections 3 to 5 (docs/long_context_recipe.md, value by value)",
        ),
        stages=(
            Stage(
                seq_length=None,
                train_tokens=5_000_000_000,
                data=("--strategy", "per-source", "--source-shares", "slimpajama"),
            ),
        ),
        base="llama2_7b_80k",
    )


def prolong() -> Published:
    """ProLong: 64K, then 512K; books and code repositories beside short data; document masks."""
    short = {
        "fineweb-edu": 0.1,
        "fineweb-2023-50": 0.1,
        "stackexchange": 0.04,
        "dolmawiki": 0.04,
        "tuluv2": 0.03,
        "arxiv": 0.03,
        "openwebmath": 0.03,
        "textbooks": 0.03,
    }

    cosine: dict[str, object] = {"--lr-decay-style": "cosine", "--lr-warmup-fraction": 0.1}

    def stage(
        length: int, steps: int, batch: int, base: int, rates: dict[str, float], **long: float
    ) -> Stage:
        return Stage(
            seq_length=length,
            train_tokens=steps * batch,
            tokens_per_batch=batch,
            rope={"--rotary-base": base},
            schedule={**rates, **cosine},
            masks_documents=True,
            data=("--strategy", "original"),
            shares={name.replace("_", "-"): share for name, share in long.items()} | short,
        )

    return Published(
        title="ProLong",
        start="Llama-3-8B-Instruct",
        sources=(
            f"{PROLONG}: train_64K.sh, train_512K.sh, README.md (the second stage loads the optimizer of the "
            "first, not its schedule); masks: README.md; arXiv 2410.02660",
        ),
        stages=(
            stage(
                64 * K,
                5000,
                4 * K * K,
                8_000_000,
                {"--lr": 1e-5, "--min-lr": 1e-6},
                code=0.3,
                book=0.3,
            ),
            stage(
                *(512 * K, 2500, 8 * K * K, 128_000_000, {"--lr": 5e-6, "--min-lr": 5e-7}),
                code_512k=0.15,
                code_64k=0.15,
                book_512k=0.05,
                book_64k=0.25,
            ),
        ),
        notes=(
            "books and repositories are packed from documents of at least 64K (512K) tokens (README.md): no "
            "flag leaves shorter ones out; give such files as sources of these names",
            "512K needs another layout than the base recipe's: megatron-long plan --seq-length 512K",
        ),
    )


def olmo3() -> Published:
    """OLMo 3 (7B): 64K by YaRN, 34% long and 66% short, masks, linear decay to 0."""
    return Published(
        title="OLMo 3 7B",
        start="Olmo-3-7B after midtraining, with its optimizer",
        sources=(
            f"{OLMO}/OLMo-3-1025-7B-long-context.py (window, batch, YaRN, rate, masks, optimizer kept), "
            "README.md (50B tokens)",
            "34% and 66%: arXiv 2512.13961, section 3.6 and table 11, read in an extract only",
        ),
        stages=(
            Stage(
                seq_length=64 * K,
                train_tokens=50_000_000_000,
                tokens_per_batch=4 * K * K,
                rope={
                    "--rope-method": "yarn",
                    "--rope-factor": 8,
                    "--rope-original-length": 8 * K,
                },
                schedule={
                    "--lr": 0.00020712352850360292,
                    "--min-lr": 0,
                    "--lr-decay-style": "linear",
                    "--lr-warmup-iters": 200,
                },
                masks_documents=True,
                data=("--short-share", "0.66", "--short-keep-ratio", "0", "--long-threshold", "8K"),
            ),
        ),
        notes=(
            "the rate is that of a model at the end of pretraining (table 35 of the paper has 2.074e-4); "
            "z-loss 1e-5 and no weight decay of the embedding have no flag here",
            "a Hugging Face model has no optimizer: from a run of midtraining give --next-stage-of instead",
            "long documents there are PDFs and synthetic tasks of 8K tokens and more, short ones the mixture "
            "of midtraining: here both come from the same sources",
            "documents there are packed by best fit and filtered by compressibility, and YaRN is on the "
            "layers with full attention only",
            "the 32B model has twice the batch and tokens, and is the mean of its checkpoints at steps "
            "10,000, 11,000 and 11,921 (section 3.6.4): megatron-long average",
        ),
    )


def smollm3() -> Published:
    """SmolLM3: 32K, then 64K, RoPE base raised, document masks, no upsampling of long documents."""

    def stage(seq_length: int, base: int, steps: int, windows: int) -> Stage:
        return Stage(
            seq_length=seq_length,
            train_tokens=steps * windows * seq_length,
            tokens_per_batch=windows * seq_length,
            rope={"--rotary-base": base},
            schedule={
                "--lr": 2e-5,
                "--min-lr": 0,
                "--lr-decay-style": "cosine",
                "--lr-warmup-iters": 1000,
            },
            masks_documents=True,
            keeps_optimizer=False,
            data=("--strategy", "original"),
        )

    return Published(
        title="SmolLM3",
        start="SmolLM3-3B after pretraining at 4K",
        sources=(
            f"{SMOLLM}: long_context_4k_to_32k.yaml, long_context_32k_to_64.yaml (load_optimizer: false)",
            "github.com/huggingface/blog, smollm3.md, Long Context extension",
        ),
        stages=(stage(32 * K, 2_000_000, 20_000, 72), stage(64 * K, 5_000_000, 22_000, 36)),
        notes=(
            "the blog says 1.5M for the first base, and 50B tokens for each stage; the files are followed",
            "the mixture is that of the decay phase of pretraining with more math, code and reasoning",
            "its layers without RoPE are not supported",
        ),
    )


def ultralong() -> Published:
    """UltraLong: 128K to 1M in one step by YaRN, a separator between documents, no masks."""
    return Published(
        title="UltraLong-8B 1M",
        start="Llama-3.1-8B-Instruct",
        sources=(
            "arXiv 2504.06214; research.nvidia.com/labs/adlr/ultralong (1B tokens, upsampling in each "
            "domain, separator, no masks)",
            "factor 128 of 8K, alpha 1 and beta 4, rate 3e-5, fewer short documents: the paper, read in "
            "extracts only",
        ),
        stages=(
            Stage(
                seq_length=K * K,
                train_tokens=1_000_000_000,
                rope={
                    "--rope-method": "yarn",
                    "--rope-factor": 128,
                    "--rope-original-length": 8 * K,
                    "--yarn-beta-fast": 4,
                    "--yarn-beta-slow": 1,
                },
                schedule={"--lr": 3e-5},
                data=("--document-separator", "<|reserved_special_token_0|>"),
            ),
        ),
        notes=(
            "batch, schedule and warm-up could not be read: those of the base recipe are taken",
            'the separator of the paper is "<s>", which is no token of Llama-3: a reserved one here',
            "documents above 8K are upsampled there: here all from 4K on",
            "2M and 4M have factors 256 and 512 (4M: 150 steps of 2 windows, by its model card)",
            "1M needs another layout than the base recipe's: megatron-long plan --seq-length 1M",
        ),
    )


def llama3_stages() -> Published:
    """Llama 3's growth from 8K to 128K in stages, masks, at its RoPE base of 500,000."""

    def stage(seq_length: int) -> Stage:
        return Stage(
            seq_length=seq_length,
            train_tokens=5_000_000_000,
            rope={"--rotary-base": 500_000},
            masks_documents=True,
            data=("--strategy", "original"),
        )

    return Published(
        title="Llama 3",
        start="Llama-3-8B",
        sources=(
            "arXiv 2407.21783, sections 3.2 (masks, base) and 3.4.2 (405B: six stages from 8K to 128K, about "
            "800B tokens), read in copies of its text",
        ),
        stages=tuple(stage(length * K) for length in (16, 32, 64, 128)),
        notes=(
            "the paper does not print the lengths between 8K and 128K, nor the tokens of each stage: "
            "doubling is ours, as are 5B tokens",
            "nor the learning rate, batch and mixture of these stages",
        ),
    )


PUBLISHED: dict[str, Callable[[], Published]] = {
    recipe.__name__: recipe for recipe in (paper, prolong, olmo3, smollm3, ultralong, llama3_stages)
}
