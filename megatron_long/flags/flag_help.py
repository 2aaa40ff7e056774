"""What `--help` shows: our flags before Megatron's, with units and defaults; and how lengths are read."""

from argparse import ArgumentParser

from megatron_long.cli import length_tokens

PROGRAM = "python -m megatron_long.pretrain"
OURS = "megatron_long"
"""First word of the titles of our groups."""
LENGTHS = frozenset(
    (
        "seq_length",
        "max_position_embeddings",
        "encoder_seq_length",
        "decoder_seq_length",
        "yarn_original_max_position_embeddings",
        "rope_scaling_original_length",
        "rope_original_length",
        "needle_min_length",
    )
)
"""Arguments that are lengths in tokens, which may be written 128K."""
UNITS = {
    "save_minutes": "MINUTES",
    "hang_timeout": "SECONDS",
    "keep_last": "CHECKPOINTS",
    "keep_every": "STEPS",
    "max_faulty_steps": "STEPS",
    "spike_deviations": "DEVIATIONS",
    "needle_interval": "STEPS",
    "position_loss_interval": "STEPS",
    "position_loss_documents": "DOCUMENTS",
    "needle_num_lengths": "LENGTHS",
    "needle_num_depths": "DEPTHS",
    "rope_factor": "FACTOR",
    "rope_method": "METHOD",
    "recipe": "NAME",
    "needle_haystack": "FILE",
    "loss_log": "FILE",
}
"""What the value of a flag counts or names; of other texts, a path."""


def take_lengths(parser: ArgumentParser) -> None:
    """Let the flags of `LENGTHS` take 128K for 131072."""
    for action in parser._actions:
        if action.dest in LENGTHS:
            action.type = length_tokens


def describe_own(parser: ArgumentParser) -> None:
    """Write unit and default into the help of our flags."""
    for group in parser._action_groups:
        if not (group.title or "").startswith(OURS):
            continue
        for action in group._group_actions:
            if action.nargs != 0:
                text = "PATH" if action.type is str else "N"
                text = "TOKENS" if action.dest in LENGTHS else text
                action.metavar = UNITS.get(action.dest, text)
            if action.default not in (None, False) and "default" not in (action.help or ""):
                action.help = f"{action.help} Default: %(default)s."


def put_own_first(parser: ArgumentParser) -> None:
    """Give our groups before Megatron's, and one line of usage for that of some 700 flags."""
    groups = parser._action_groups
    groups.sort(key=lambda group: not (group.title or "").startswith(OURS))
    parser.usage = f"{PROGRAM} [flags]; ours first, then those of Megatron"
