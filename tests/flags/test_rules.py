"""Values that break a rule of their flag, and flags that do not go together, are refused by name."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_long import command_line
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.rules import RULES, check_rules, flag_of

host_backend.install()

FLAGS = "--recipe tiny_debug --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --train-iters 5"


def parse(flags: str, world_size: int = 1, backend=HOST):
    return command_line.parse([*FLAGS.split(), *flags.split()], backend, world_size)[1]


def refusal(flags: str, world_size: int = 1, backend=HOST) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(flags, world_size, backend)
    return str(refused.value)


def test_rules_are_about_flags_that_exist():
    """A rule about others would never hold."""
    known = set(map(flag_of, vars(parse(""))))
    named = {word for r in RULES for words in (r.flags, r.when, r.unless) for word in words.split()}
    assert named <= known


def test_a_rule_is_left_out_where_not_all_flags_are_known_yet():
    check_rules(Namespace(export_hf="x"))
    with pytest.raises(ConfigError, match=r"^--export-hf x writes .*; give --save too$"):
        check_rules(Namespace(export_hf="x", save=None))


@pytest.mark.parametrize("backend", [HOST, GPU])
@pytest.mark.parametrize(
    "flags",
    [
        "--num-experts 4",
        "--num-experts 0",
        "--qk-layernorm",
        "--qk-l2-norm",
        "--normalization LayerNorm",
        "--position-embedding-type none",
        "--position-embedding-type learned_absolute",
        "--multi-latent-attention",
        "--mtp-num-layers 1",
        "--no-rope-freq 4",
        "--attention-output-gate",
        "--linear-attention-freq 4",
        "--experimental-attention-variant dsa",
        "--heterogeneous-layers-config-path x",
        "--apply-layernorm-1p",
    ],
)
def test_what_is_no_llama_is_refused(flags, backend):
    text = refusal(flags, backend=backend)
    assert text.startswith(f"{flags} is not supported: no hf_config.json of a Llama")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--window-size 128,0", "--window-size (128, 0) is not supported: attention here always"),
        ("--use-mup", "the chunked loss does not scale these"),
        ("--use-mup --megatron-loss", "no hf_config.json of a Llama can say it"),
        ("--defer-embedding-wgrad-compute", "drop the flag, or give --megatron-loss"),
        ("--rampup-batch-size 2 2 8", "give --step-batch-size-schedule"),
        ("--sft", "--sft is not supported: training data here are plain windows"),
        ("--fim-data", "--fim-data is not supported: training data here are plain windows"),
        ("--use-checkpoint-args", "the model comes from the hf_config.json of --load anyway"),
        ("--use-mp-args-from-checkpoint-args", "give the layout by its flags"),
        ("--full-validation", "--full-validation without --multiple-validation-sets"),
        ("--multiple-validation-sets", "--multiple-validation-sets without --full-validation"),
    ],
)
def test_what_the_run_would_drop_is_refused(flags, words):
    assert words in refusal(flags)


def test_megatrons_own_loss_can_defer_its_gradients():
    assert parse("--defer-embedding-wgrad-compute --megatron-loss").defer_embedding_wgrad_compute


@pytest.mark.parametrize(
    "flag",
    [
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--context-parallel-size",
        "--seq-length",
        "--micro-batch-size",
        "--global-batch-size",
        "--num-layers",
        "--num-attention-heads",
        "--train-iters",
        "--log-interval",
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_positive(flag, value):
    told = f"{flag} {value} is out of range; it must be 1 or more"
    if flag == "--seq-length":
        told = f"argument --seq-length: '{value}' is not a length of 1 token or more"
    assert refusal(f"{flag} {value}").startswith(told)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr-warmup-iters 5", "--lr-warmup-iters 5 is not below --train-iters 5"),
        ("--lr-warmup-iters 4 --lr-decay-iters 3", "is not below --lr-decay-iters 3"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0 is out of range"),
    ],
)
def test_a_warmup_that_does_not_end_is_refused(flags, words):
    assert words in refusal(flags)


def test_a_warmup_that_ends_is_taken():
    assert parse("--lr-warmup-iters 4").lr_warmup_iters == 4
    assert parse("--lr-warmup-iters 10 --lr-decay-iters 20").lr_decay_iters == 20


def test_tensorboard_folder_that_is_a_file_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        told = refusal(f"--tensorboard-dir {path}")
        assert f"{path} is a file or lies below one, and a folder is needed" in told
    folder = str(tmp_path / "new" / "folder")
    assert parse(f"--tensorboard-dir {folder}").tensorboard_dir == folder


@pytest.mark.parametrize(
    "flags",
    [
        "--decoder-first-pipeline-num-layers 2",
        "--decoder-last-pipeline-num-layers 2",
        "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split",
        "--pipeline-model-parallel-layout Et|tt|tL",
    ],
)
def test_uneven_stages_are_taken(flags):
    layout = "--pipeline-model-parallel-size 3"
    assert "--num-layers 4 is not a multiple" in refusal(layout, 3)
    assert parse(f"{layout} {flags}", 3).pipeline_model_parallel_size == 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("", "--hierarchical-context-parallel-sizes is missing"),
        ("--hierarchical-context-parallel-sizes 2", "2 does not fit"),
        ("--hierarchical-context-parallel-sizes 2 4", "2 4 does not fit"),
        (
            "--hierarchical-context-parallel-sizes 4 1",
            "--num-query-groups 2 is not a multiple of --tensor-model-parallel-size 1 * the first of "
            "--hierarchical-context-parallel-sizes 4 1 (4), which --cp-comm-type a2a+p2p needs",
        ),
    ],
)
def test_a2a_and_p2p_needs_sizes_and_heads(sizes, words):
    flags = "--context-parallel-size 4 --cp-comm-type a2a+p2p "
    assert words in refusal(flags + sizes, 4)
    parse(flags + "--hierarchical-context-parallel-sizes 2 2", 4)


def test_a2a_and_p2p_counts_the_heads_of_a_tensor_parallel_rank():
    flags = "--context-parallel-size 4 --cp-comm-type a2a+p2p --tensor-model-parallel-size 2 "
    text = refusal(flags + "--hierarchical-context-parallel-sizes 2 2", 8)
    assert (
        "--num-query-groups 2 is not a multiple of --tensor-model-parallel-size 2 * the first"
        in text
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--save-minutes nan", "--save-minutes nan is not a finite number"),
        ("--save-minutes inf", "--save-minutes inf is not a finite number"),
        ("--spike-deviations nan", "--spike-deviations nan is not a finite number"),
        ("--hang-timeout inf", "--hang-timeout inf is not a finite number"),
        ("--clip-grad nan", "--clip-grad nan is not a finite number"),
        ("--lr inf", "--lr inf is not a finite number"),
        ("--clip-grad -1", "--clip-grad -1.0 is out of range; it must be at least 0"),
        ("--weight-decay -1", "--weight-decay -1.0 is out of range"),
        ("--adam-beta1 1", "--adam-beta1 1.0 is out of range; it must be at least 0 and below 1"),
        ("--adam-eps 0", "--adam-eps 0.0 is out of range; it must be above 0"),
        ("--hidden-dropout 2", "--hidden-dropout 2.0 is out of range"),
        ("--lr-warmup-iters -1", "--lr-warmup-iters -1 is out of range"),
        ("--lr-warmup-fraction -1", "--lr-warmup-fraction -1.0 is out of range"),
        ("--num-workers -1", "--num-workers -1 is out of range"),
        ("--eval-iters -1", "--eval-iters -1 is out of range"),
        ("--init-method-std -1", "--init-method-std -1.0 is out of range"),
        ("--embedding-init-method-std -1", "--embedding-init-method-std -1.0 is out of range"),
        ("--init-method-std 0", "--init-method-std 0 gives random weights that are all 0"),
        ("--embedding-init-method-std 0", "--embedding-init-method-std 0 gives random"),
        ("--train-iters 9223372036854775807", "windows in all; give at most 1152921504606846975"),
        ("--seed 0", "--seed 0 is out of range; it must be 1 to 4,000,000,000"),
        ("--seed 99999999999", "--seed 99999999999 is out of range"),
        ("--ckpt-step 0", "--ckpt-step 0 is out of range; it must be 1 or more"),
        ("--ckpt-step -3", "--ckpt-step -3 is out of range; it must be 1 or more"),
        ("--save-interval 0", "--save-interval 0 is out of range; it must be 1 or more"),
        ("--rope-method linear --rope-factor inf", "--rope-factor inf is not a finite number"),
        ("--rope-factor 0", "--rope-factor 0.0 belongs to --rope-method"),
    ],
)
def test_numbers_are_finite_and_in_range(flags, words):
    assert words in refusal(flags)


@pytest.mark.parametrize(
    ("flags", "minutes", "steps"),
    [
        ("", 30.0, None),
        ("--save-interval 7", 0.0, 7),
        ("--save-minutes 5", 5.0, None),
        ("--save-minutes 5 --save-interval 7", 5.0, 7),
        ("--save-minutes 0", 0.0, None),
    ],
)
def test_checkpoints_are_saved_by_time_unless_steps_are_counted(flags, minutes, steps):
    from megatron_long.flags.arguments import NEVER

    args = parse(flags)
    assert args.save_interval == (steps or NEVER)
    assert args.save_minutes == minutes


def test_counting_steps_to_keep_needs_steps_to_save():
    assert "give it too, or --keep-last" in refusal("--save-retain-interval 10")
    assert "--save-minutes -1.0 is out of range; it must be at least 0" in refusal(
        "--save-minutes -1"
    )


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--context-parallel-size 4", 4, "--num-query-groups 2 is not a multiple"),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 2",
            4,
            "--tensor-model-parallel-size 2 * --context-parallel-size 2 (4)",
        ),
        ("--context-parallel-size 8", 8, "--num-attention-heads 4 is not a multiple"),
    ],
)
def test_a2a_needs_heads_to_deal_out(flags, world_size, words):
    text = refusal(f"{flags} --cp-comm-type a2a", world_size)
    assert words in text
    assert "--cp-comm-type a2a needs" in text
    assert parse(f"{flags} --cp-comm-type p2p", world_size).cp_comm_type == ["p2p"]
    assert parse("--context-parallel-size 2 --cp-comm-type a2a", 2).cp_comm_type == ["a2a"]
