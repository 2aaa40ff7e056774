"""The runs: learning rates, the long one, the mixtures."""

import json
from pathlib import Path

from examples.smollm2_128k.job_runner import Job
from examples.smollm2_128k.measuring import loss_job
from examples.smollm2_128k.work import MIXTURES, Model, Work
from megatron_long.errors import ConfigError

RECIPE = "llama2_7b_80k"
"""The paper's: constant learning rate, its optimizer; lengths, RoPE base and model are our own."""


def sweep(work: Work) -> list[list[Job]]:
    """Short runs of several learning rates on the main mixture, and their loss on held-out documents."""
    rates = work.settings.sweep_rates
    if work.settings.learning_rate is not None:
        return []
    runs = [
        _train(work, f"sweep-{rate:g}", "per-source", work.settings.sweep_steps, rate, gpus=1)
        for rate in rates
    ]
    losses = [
        loss_job(
            work,
            Model(f"sweep-{rate:g}", work.run(f"sweep-{rate:g}"), work.settings.sweep_steps),
            "loss-sweep",
            ("--dataset", str(work.dataset("held-out"))),
            work.settings.seq_length,
            buckets=(
                (0, work.settings.original_length),
                (work.settings.original_length, work.settings.seq_length),
            ),
            more=(
                *("--min-document-tokens", str(work.settings.original_length)),
                *("--max-documents-per-source", str(work.settings.sweep_documents)),
            ),
        )
        for rate in rates
    ]
    return [runs, losses]


def main_run(work: Work) -> list[list[Job]]:
    """The long run, on all GPUs."""
    rate = choose_rate(work)
    steps = work.settings.main_steps
    return [[_train(work, "per-source", "per-source", steps, rate, gpus=work.gpus)]]


def mixtures(work: Work) -> list[list[Job]]:
    """The runs that are compared with the main run at the same number of tokens, a GPU each."""
    rate = choose_rate(work)
    steps = work.settings.mixture_steps
    return [[_train(work, name, name, steps, rate, gpus=1) for name in MIXTURES]]


def choose_rate(work: Work) -> float:
    """The learning rate with the least held-out loss beyond the old context.

    Raises: ConfigError: the sweep has not run.
    """
    if work.settings.learning_rate is not None:
        return work.settings.learning_rate
    losses = sweep_losses(work.results)
    if len(losses) < len(work.settings.sweep_rates):
        raise ConfigError(
            f"{work.results} has the losses of {len(losses)} of {len(work.settings.sweep_rates)} learning "
            "rates; run the phase sweep first, or give --learning-rate"
        )
    return min(losses, key=lambda rate: losses[rate])


def sweep_losses(results: Path) -> dict[float, float]:
    """Loss beyond the old context by learning rate, nats a token; a diverged run counts as infinite."""
    losses: dict[float, float] = {}
    for path in sorted(results.glob("sweep-*/loss-sweep.json")):
        means = json.loads(path.read_text())["all"]["mean_loss"]
        beyond = list(means.values())[-1]
        losses[float(path.parent.name.removeprefix("sweep-"))] = (
            float("inf") if beyond is None else beyond
        )
    return losses


def _train(work: Work, name: str, dataset: str, steps: int, rate: float, *, gpus: int) -> Job:
    settings, output = work.settings, work.run(name)
    leave = () if work.minutes is None else ("--exit-duration-in-mins", str(work.minutes))
    return Job(
        name=f"train-{name}",
        all_gpus=gpus > 1,
        may_stop_early=True,
        finished=output / "latest_checkpointed_iteration.txt",
        finished_text=str(steps),
        command=(
            *(*work.processes(gpus), "-m", "megatron_long.pretrain", "--recipe", RECIPE),
            *("--dataset", str(work.dataset(dataset)), "--pretrained-checkpoint", str(work.base)),
            *("--load", str(output), "--save", str(output)),
            *("--tensor-model-parallel-size", "1", "--context-parallel-size", "1"),
            *("--seq-length", str(settings.seq_length)),
            *("--max-position-embeddings", str(settings.eval_length)),
            *("--rotary-base", str(settings.rotary_base)),
            *("--global-batch-size", str(settings.global_batch_windows)),
            *("--train-iters", str(steps), "--lr", f"{rate:g}", "--min-lr", f"{rate:g}"),
            *("--save-interval", str(settings.save_interval)),
            *("--loss-log", str(work.results / name / "train.jsonl")),
            *("--tensorboard-dir", str(work.results / name / "tensorboard"), *leave),
        ),
    )
