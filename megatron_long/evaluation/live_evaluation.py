"""Needle heatmap and loss by source and position while training, on the shards as they are.

Nothing of the run is touched: no data is drawn from its loaders, no random number from its generators, and
its timers stand still meanwhile; losses are the same, bit by bit, with and without it. Everything that can
be wrong is checked before the model is built.

Each evaluation writes `iter_0000100/` with needle.json, needle.png, loss.json, loss.png and progress.json;
figures and means go to TensorBoard and W&B where the run logs there.
"""

import json
from argparse import Namespace
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.errors import ConfigError
from megatron_long.evaluation.batches import TokenScorer
from megatron_long.evaluation.input_checks import check_output
from megatron_long.evaluation.loss.loss_report import ALL_SOURCES, format_bucket
from megatron_long.evaluation.loss.loss_run import (
    LossPlan,
    LossRequest,
    held_out_documents,
    plan_loss,
    run_loss,
    write_loss_files,
)
from megatron_long.evaluation.models import MeasuredModel
from megatron_long.evaluation.needle.haystack import read_haystack
from megatron_long.evaluation.needle.needle_report import summarize
from megatron_long.evaluation.needle.needle_run import (
    NeedlePlan,
    NeedleRequest,
    plan_needles,
    run_needles,
    write_needle_files,
)
from megatron_long.evaluation.report.plots import heatmap_figure, position_figure
from megatron_long.files import atomic_path
from megatron_long.job.side_output import survived

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER_NAME = "evaluation"
PROGRESS_NAME = "progress.json"
VIRTUAL_STAGE_FLAGS = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)


@dataclass(kw_only=True)
class EvaluationArguments:
    """Flags for evaluations during training."""

    needle_interval: int | None = None
    """Steps between needle heatmaps; one is also made after the last step."""

    needle_haystack: str | None = None
    """Long text file in which --needle-interval hides its needle."""

    needle_num_lengths: int = 8
    """Context lengths of the heatmap, up to --seq-length."""

    needle_num_depths: int = 5
    """Depths of the heatmap."""

    needle_min_length: int | None = None
    """Shortest context of the heatmap, tokens; by default 1024, or an eighth of --seq-length if less."""

    position_loss_interval: int | None = None
    """Steps between measurements of the loss by source and position on the held-out documents of
    --dataset; one is also made after the last step."""

    position_loss_documents: int = 16
    """Held-out documents of each source for --position-loss-interval."""

    evaluation_dir: str | None = None
    """Folder for the results; by default evaluation/ in the folder of --save."""


@dataclass(frozen=True)
class Logs:
    """Where the run logs to, on the one rank that does."""

    tensorboard: Any = None
    wandb: Any = None

    def scalar(self, name: str, value: float, iteration: int) -> None:
        """Log one number."""
        if self.tensorboard is not None:
            self.tensorboard.add_scalar(name, value, iteration)
        if self.wandb is not None:
            self.wandb.log({name: value}, iteration)

    def figure(self, name: str, figure: "Figure", iteration: int) -> None:
        """Log an image."""
        if self.tensorboard is not None:
            self.tensorboard.add_figure(name, figure, iteration, close=False)
        if self.wandb is not None:
            self.wandb.log({name: self.wandb.Image(figure)}, iteration)


@dataclass(frozen=True)
class Scheduled[Plan: (NeedlePlan, LossPlan)]:
    """What is measured every so many steps."""

    interval: int
    plan: Plan

    def at(self, iteration: int) -> Plan:
        """Give the plan whose report names this step."""
        settings = replace(self.plan.settings, iteration=str(iteration))
        return replace(self.plan, settings=settings)


@dataclass(frozen=True)
class LiveEvaluation:
    """What is measured when, and where it goes."""

    folder: Path
    args: Namespace
    """The run's flags, where Megatron also counts; some values are known only after its own checks."""
    needle: Scheduled[NeedlePlan] | None
    loss: Scheduled[LossPlan] | None

    def is_due(self, iteration: int) -> bool:
        """Whether something is measured after this step."""
        return any(self._is_due(part, iteration) for part in (self.needle, self.loss))

    def _is_due(self, part: Scheduled | None, iteration: int) -> bool:
        if part is None:
            return False
        return iteration % part.interval == 0 or iteration == self.args.train_iters

    def run(self, scorer: TokenScorer, iteration: int, logs: Logs) -> None:
        """Measure; every rank of the job calls this with the model in evaluation mode."""
        folder = self.folder / f"iter_{iteration:07d}"
        if self.needle is not None and self._is_due(self.needle, iteration):
            self._run_needle(self.needle.at(iteration), scorer, folder, iteration, logs)
        if self.loss is not None and self._is_due(self.loss, iteration):
            self._run_loss(self.loss.at(iteration), scorer, folder, iteration, logs)
        if scorer.is_writer:
            tokens = self.args.consumed_train_samples * self.args.seq_length
            progress = {"iteration": iteration, "tokens": tokens}
            path = folder / PROGRESS_NAME
            with survived(str(path)), atomic_path(path) as temporary:
                temporary.write_text(json.dumps(progress) + "\n", encoding="utf-8")

    def _run_needle(
        self, plan: NeedlePlan, scorer: TokenScorer, folder: Path, iteration: int, logs: Logs
    ) -> None:
        report = run_needles(plan, scorer)
        title = f"Needle in a haystack, step {iteration}"
        if scorer.is_writer:
            with survived(f"needle results in {folder}"):
                write_needle_files(folder, report, title=title)
        if logs != Logs():
            for name, value in summarize(report.results, None)["all"].items():
                if name != "num_cells":
                    logs.scalar(f"needle/{name}", value, iteration)
            logs.figure("needle/heatmap", heatmap_figure(report.results, title=title), iteration)

    def _run_loss(
        self, plan: LossPlan, scorer: TokenScorer, folder: Path, iteration: int, logs: Logs
    ) -> None:
        report = run_loss(plan, scorer)
        loss, title = report.loss, f"Loss by position in the document, step {iteration}"
        if scorer.is_writer:
            with survived(f"losses by position in {folder}"):
                write_loss_files(report, folder / "loss.json", folder / "loss.png", title=title)
        if logs != Logs():
            for bucket in plan.settings.buckets:
                for source in (*loss.loss_sums, None):
                    if loss.num_tokens(*bucket, source):
                        name = f"position-loss/{source or ALL_SOURCES} {format_bucket(bucket)}"
                        logs.scalar(name, loss.mean(*bucket, source), iteration)
            logs.figure("position-loss/curves", position_figure(loss, title=title), iteration)


def plan_live_evaluation(
    args: Namespace, dataset: str | None, tokenizer: Path | None
) -> LiveEvaluation | None:
    """Prepare what the flags ask for; None where they ask for nothing.

    Args:
        args: All parsed flags, those of `EvaluationArguments` among them.
        dataset: Folder of `--dataset`.
        tokenizer: Folder of the run's tokenizer, if one is known.
    Raises: ConfigError: something needed is missing, or the haystack or documents do not do.
    """
    own = EvaluationArguments(
        **{field.name: getattr(args, field.name) for field in fields(EvaluationArguments)}
    )
    if own.needle_interval is None and own.position_loss_interval is None:
        return None
    if own.evaluation_dir is None and args.save is None:
        raise ConfigError(
            "--needle-interval and --position-loss-interval write files, and neither --save nor "
            "--evaluation-dir says where; give one"
        )
    if any(getattr(args, name, None) for name in VIRTUAL_STAGE_FLAGS):
        raise ConfigError(
            "--needle-interval and --position-loss-interval run without virtual pipeline stages; drop "
            "the flag for these, or evaluate the checkpoints with tools/evaluate_needle.py"
        )
    folder = Path(own.evaluation_dir or Path(args.save) / FOLDER_NAME)
    check_output(folder / PROGRESS_NAME, force=True, flag="--evaluation-dir")
    for name in ("needle_num_lengths", "needle_num_depths", "position_loss_documents"):
        if getattr(own, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(own, name)} measures nothing; give 1 or more")
    return LiveEvaluation(
        folder=folder,
        args=args,
        needle=_plan_needle(own, args, tokenizer),
        loss=_plan_loss(own, args, dataset),
    )


def _plan_needle(
    own: EvaluationArguments, args: Namespace, tokenizer_path: Path | None
) -> Scheduled[NeedlePlan] | None:
    from megatron_long.tokenizer.loading import load_tokenizer

    if own.needle_interval is None:
        return None
    _check_interval("--needle-interval", own.needle_interval)
    if own.needle_haystack is None:
        raise ConfigError("--needle-interval needs a long text: give --needle-haystack FILE")
    if tokenizer_path is None:
        raise ConfigError(
            "--needle-interval needs the model's tokenizer, and none lies next to --load, "
            "--pretrained-checkpoint or --dataset; put its files into a folder tokenizer/ there"
        )
    request = NeedleRequest.of_training(args)
    text = read_haystack(request.haystack)
    tokenizer = load_tokenizer(tokenizer_path, "reference")
    if (own.needle_min_length or 1) > args.seq_length:
        raise ConfigError(
            f"--needle-min-length {own.needle_min_length} is above --seq-length {args.seq_length}; give a "
            "smaller one"
        )
    try:
        plan = plan_needles(request, _trained_model(args), text, tokenizer)
    except ConfigError as error:
        raise ConfigError(
            f"no heatmap of --needle-haystack {own.needle_haystack} up to --seq-length "
            f"{args.seq_length}: {error}"
        ) from error
    return Scheduled(own.needle_interval, plan)


def _trained_model(args: Namespace) -> MeasuredModel:
    return MeasuredModel(path=str(args.save or args.evaluation_dir))


def _plan_loss(
    own: EvaluationArguments, args: Namespace, dataset: str | None
) -> Scheduled[LossPlan] | None:
    from megatron_long.dataset.manifest import read_manifest

    if own.position_loss_interval is None:
        return None
    _check_interval("--position-loss-interval", own.position_loss_interval)
    if dataset is None:
        raise ConfigError(
            "--position-loss-interval reads the held-out documents of --dataset, which is not given"
        )
    manifest = read_manifest(Path(dataset))
    request = LossRequest.of_training(args, dataset)
    documents = held_out_documents(request, manifest)
    plan = plan_loss(request, _trained_model(args), documents, manifest.fingerprint)
    return Scheduled(own.position_loss_interval, plan)


def _check_interval(flag: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{flag} {value} is not a number of steps; give 1 or more")
