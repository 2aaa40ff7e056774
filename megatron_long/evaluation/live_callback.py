"""Evaluation while training, as an event of its loop: see `live_evaluation` for what is measured."""

from argparse import Namespace
from collections.abc import Callable

from megatron_long.engine.callback import Callback, Step
from megatron_long.engine.pausing import training_paused
from megatron_long.evaluation.live_evaluation import LiveEvaluation, Logs


class EvaluateLive(Callback):
    """Evaluates after the steps that the plan names.

    Args:
        args: Flags after Megatron's validation.
        vocab_size: Gives the real tokens of the model.
        on_batch: Called before each batch: a sign of life.
    """

    def __init__(
        self,
        live: LiveEvaluation,
        args: Namespace,
        vocab_size: Callable[[], int],
        on_batch: Callable[[], None],
    ) -> None:
        self.live, self.args = live, args
        self.vocab_size, self.on_batch = vocab_size, on_batch

    def between_steps(self, step: Step) -> None:
        """Measure if it is time; a collective of all ranks."""
        if not self.live.is_due(step.iteration):
            return
        with training_paused(step) as writers:
            from megatron_long.evaluation.scoring import Scorer

            scorer = Scorer(
                step.model[0],
                context_length=self.args.seq_length,
                vocab_size=self.vocab_size(),
                sequence_parallel=self.args.sequence_parallel,
                on_batch=self.on_batch,
            )
            self.live.run(scorer, step.iteration, Logs(writers.tensorboard, writers.wandb))
