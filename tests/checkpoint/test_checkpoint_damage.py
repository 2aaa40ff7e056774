"""Damaged checkpoints: whatever byte is wrong is found before loading, and the last good one is taken."""

import json
import random
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_long import pretrain
from megatron_long.checkpoint import choosing, hashes, torch_dist
from megatron_long.checkpoint.run_identity import check_same_optimizer
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.input_checks import find_checkpoint
from tests.fake_checkpoints import find_iteration
from tests.job_fixtures import FLAGS

TRACKER = "latest_checkpointed_iteration.txt"
NEWEST = "iter_0000004"


@pytest.fixture(scope="module")
def run(jobs, tmp_path_factory) -> Path:
    """A run of two processes with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    flags = ("--train-iters", 6, "--save-interval", 2, "--exit-interval", 4, "--save", folder)
    jobs.run(2, *flags, "--use-distributed-optimizer")
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(run, tmp_path / "ckpt")


def load(folder: Path, dataset: Path, *flags: object):
    """What `pretrain` does up to the point where Megatron reads the checkpoint that is given here."""
    argv = [*FLAGS, "--dataset", dataset, "--train-iters", 6, "--load", folder, *flags]
    return pretrain.prepare([str(word) for word in argv])[2]


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= generator.randrange(1, 256)
    path.write_bytes(content)


def covered(folder: Path) -> list[str]:
    """Files of the newest checkpoint, and those next to the checkpoints."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    uncovered = ("iter_0000002/", "logs/", ".save_lock")
    return sorted(name for name in names if not name.startswith(uncovered))


def test_a_whole_checkpoint_is_taken_without_a_word(copy, tiny_dataset, capsys):
    start = load(copy, tiny_dataset)
    assert (start.choice.iteration, start.resumes, start.choice.reports) == (4, True, ())
    assert "warning" not in capsys.readouterr().err
    assert {".metadata", "metadata.json", "training.json", "__0_0.distcp", "__1_0.distcp"} < {
        path.name for path in (copy / NEWEST).iterdir()
    }


@pytest.mark.slow
def test_two_hundred_flipped_bytes_are_found(copy, tiny_dataset, capsys, caplog):
    """By `pretrain.prepare`, which every start of training runs and whose choice Megatron loads."""
    generator, names = random.Random(7), covered(copy)
    found: dict[str, int] = {}
    for number in range(200):
        name = names[number % len(names)]  # small files as often as large ones
        original = (copy / name).read_bytes()
        flip(copy / name, generator)
        start = load_or_refusal(copy, tiny_dataset)
        if isinstance(start, DataError):  # next to the checkpoints: nothing to fall back on
            assert name in str(start)
            assert not name.startswith("iter_")
        else:
            check_report(name, start, caplog.text + capsys.readouterr().err)
        caplog.clear()
        (copy / name).write_bytes(original)
        found[name] = found.get(name, 0) + 1
    print(f"found {sum(found.values())} of 200 in {len(found)} files")
    assert sum(found.values()) == 200
    assert load(copy, tiny_dataset).choice.reports == ()


def load_or_refusal(folder: Path, dataset: Path):
    try:
        return load(folder, dataset)
    except DataError as error:
        return error


def check_report(name: str, start, told: str) -> None:
    if name == "run.json":  # for people: no start needs it
        assert f"{name} is damaged" in told or f"{name} has" in told
        return
    assert name in "".join(start.choice.reports)
    assert name.rpartition("/")[2] in told.replace("\n", " ")
    assert start.iteration == (2 if name.startswith(NEWEST) else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{NEWEST}/__1_0.distcp", f"{NEWEST}/.metadata", TRACKER])
def test_training_goes_on_from_the_last_good_one(name, copy, run, jobs, read_log, tmp_path):
    flip(copy / name, random.Random(1))
    log = tmp_path / "log.jsonl"
    flags = ("--train-iters", 6, "--use-distributed-optimizer", "--loss-log", log)
    job = jobs.run(2, *flags, "--load", copy, "--save", copy, "--save-interval", 6)
    first = 5 if name == TRACKER else 3
    assert [step["iteration"] for step in read_log(log)] == list(range(first, 7))
    assert name in job.text.replace("\n", " ")
    assert (copy / TRACKER).read_text() == "6"
    assert (copy / f"{NEWEST}.damaged").exists() is (name != TRACKER)
    assert load(copy, jobs.dataset, "--train-iters", 9).choice.reports == ()


def remove_last_shard(folder: Path) -> None:
    (folder / NEWEST / "__1_0.distcp").unlink()


def cut_a_shard(folder: Path) -> None:
    path = folder / NEWEST / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def remove_hashes(folder: Path) -> None:
    (folder / NEWEST / "hashes.json").unlink()


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder / NEWEST)


@pytest.mark.parametrize("damage", [remove_last_shard, cut_a_shard, remove_hashes, remove_all])
def test_missing_parts_are_found(damage, copy, tiny_dataset):
    damage(copy)
    start = load(copy, tiny_dataset)
    assert start.iteration == 2
    assert NEWEST in start.choice.reports[0]


def test_a_missing_tracker_loses_nothing(copy, tiny_dataset):
    (copy / TRACKER).unlink()
    assert load(copy, tiny_dataset).iteration == 4


def test_a_tracker_that_was_set_back_needs_the_flag(copy, tiny_dataset):
    (copy / TRACKER).write_text("2")
    start = load(copy, tiny_dataset)
    assert start.iteration == 4
    assert "names 2, and the newest checkpoint of this run is 4" in start.choice.reports[0]
    assert load(copy, tiny_dataset, "--ckpt-step", 2).iteration == 2


@pytest.mark.parametrize("content", [b"\x80\x04", b"{", b"[]", b"[" * 100_000])
def test_without_hashes_a_damaged_training_json_is_named(content, copy, tiny_dataset):
    for path in (copy, copy / NEWEST, copy / "iter_0000002"):
        (path / "hashes.json").unlink()
    (copy / NEWEST / "training.json").write_bytes(content)
    with pytest.raises(DataError, match=r"training\.json is damaged: it holds no JSON object"):
        load(copy, tiny_dataset)


def test_nothing_whole_left(copy, tiny_dataset):
    for name in (NEWEST, "iter_0000002"):
        flip(copy / name / "__0_0.distcp", random.Random(2))
    with pytest.raises(DataError, match=r"holds no complete checkpoint: .*0000004.*0000002"):
        load(copy, tiny_dataset)
    with pytest.raises(DataError, match="holds no complete checkpoint"):
        load(copy, tiny_dataset, "--ckpt-step", 2)


def leave_a_cut_save(folder: Path, name: str = NEWEST) -> None:
    """As earlier versions did: Megatron's own empty folder next to ours."""
    (folder / name).mkdir(parents=True)
    (folder / f".{name}.partial").mkdir()
    (folder / f".{name}.partial" / "__0_0.distcp").write_bytes(b"half")


def leave_half_a_save(folder: Path, name: str = NEWEST) -> None:
    """As a program does that writes in place."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__0_0.distcp").write_bytes(b"half")


def cut_metadata(folder: Path, name: str = NEWEST) -> None:
    leave_half_a_save(folder, name)
    (folder / name / ".metadata").write_bytes(b"index")
    (folder / name / "metadata.json").write_text('{"sharded_backend": ')


def test_a_step_that_was_not_saved_is_told_with_those_that_were(copy, tiny_dataset):
    with pytest.raises(ConfigError, match=r"no checkpoint of that step; it has 4, 2\. Give one"):
        load(copy, tiny_dataset, "--ckpt-step", 3)


@pytest.mark.parametrize("leave", [leave_a_cut_save, leave_half_a_save, cut_metadata])
def test_a_folder_without_metadata_is_no_checkpoint(leave, run, tiny_dataset, tmp_path, capsys):
    """For no reader; where it is all there is, the run begins at its start."""
    out = tmp_path / "out"
    leave(out)
    assert not choosing.has_checkpoint(out)
    assert choosing.saved_iterations(out) == []
    start = load(out, tiny_dataset, "--pretrained-checkpoint", run, "--save", out)
    assert (start.choice.folder, start.resumes) == (run / NEWEST, False)
    assert not list(out.glob(".iter_*"))
    if leave is leave_a_cut_save:
        assert not (out / NEWEST).exists()
    else:
        assert f"{out / NEWEST}/ has no complete metadata" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match="holds no checkpoint yet, and this run has no other start"
    ):
        load(out, tiny_dataset, "--save", out)
    with pytest.raises(ConfigError, match="holds no Megatron checkpoint"):
        load(out, tiny_dataset)
    with pytest.raises(ConfigError):
        find_checkpoint(out)
    with pytest.raises(ConfigError):
        find_iteration(out)
    with pytest.raises(ConfigError, match="holds no Megatron checkpoint"):
        find_iteration(out, 4)
    with pytest.raises(DataError):
        choosing.check_whole(out / NEWEST)


def test_a_first_run_into_a_folder_that_is_not_there(run, tiny_dataset, tmp_path):
    """The launch script's `--load OUT --save OUT`: with a start it begins, without one it is told how."""
    out, other = tmp_path / "out", tmp_path / "other"
    start = load(out, tiny_dataset, "--pretrained-checkpoint", run, "--save", out)
    assert (start.choice.folder, start.resumes) == (run / NEWEST, False)
    told = f"--load {other} holds no checkpoint yet, and this run has no other start: give --pretr"
    with pytest.raises(ConfigError, match=told):
        load(other, tiny_dataset, "--save", other)
    assert not other.exists()


@pytest.mark.parametrize("was_distributed", [True, False])
def test_an_optimizer_of_the_other_kind_is_refused(was_distributed, run, monkeypatch):
    """Megatron ends in a traceback about `flattened_range`."""
    if not was_distributed:
        state = {"args": Namespace(use_distributed_optimizer=False)}
        monkeypatch.setattr(torch_dist, "read_common_state", lambda _: state)
    check_same_optimizer(run / NEWEST, Namespace(use_distributed_optimizer=was_distributed))
    first, second = ("with", "without") if was_distributed else ("without", "with")
    remedy = "give the flag" if was_distributed else "drop the flag"
    told = f"saved {first} --use-distributed-optimizer, and this run is {second} it: .*; {remedy}.*, .*give "
    with pytest.raises(ConfigError, match=told + "--no-load-optim"):
        check_same_optimizer(run / NEWEST, Namespace(use_distributed_optimizer=not was_distributed))


@pytest.mark.parametrize("leave", [leave_a_cut_save, leave_half_a_save, cut_metadata])
def test_a_cut_save_hides_no_checkpoint(leave, copy, tiny_dataset):
    """Newer than all others, whether the folder's records are there or not."""
    leave(copy, "iter_0000006")
    for records in (("nothing",), (TRACKER, "hashes.json")):
        for name in records:
            (copy / name).unlink(missing_ok=True)
        assert load(copy, tiny_dataset).iteration == 4
        assert find_checkpoint(copy).iteration == "4"
        with pytest.raises(ConfigError, match="iter_0000006"):
            find_checkpoint(copy, ["--ckpt-step", "6"])
        with pytest.raises(DataError, match="iter_0000006"):
            load(copy, tiny_dataset, "--ckpt-step", 6)


def test_what_is_recorded_and_gone_is_not_started_over(copy, run, tiny_dataset):
    """The records say that there was a run: no whole folder left is damage, not a beginning."""
    for name in (NEWEST, "iter_0000002"):
        shutil.rmtree(copy / name)
        (copy / name).mkdir()
    (copy / TRACKER).unlink()
    with pytest.raises(DataError, match=rf"{NEWEST}/ has no complete metadata"):
        load(copy, tiny_dataset, "--pretrained-checkpoint", run)


def test_what_nobody_needs_blocks_no_start(copy, tiny_dataset, caplog):
    (copy / "run.json").write_text("{")
    assert load(copy, tiny_dataset).iteration == 4
    assert find_checkpoint(copy).iteration == "4"
    (copy / "run.json").unlink()
    assert load(copy, tiny_dataset).iteration == 4
    assert caplog.text.count("run.json") == 3


def test_damage_is_no_reason_to_start_over(copy, run, tiny_dataset):
    """Megatron would take `--pretrained-checkpoint` where the tracker is gone, and lose the run."""
    (copy / TRACKER).unlink()
    shutil.rmtree(copy / NEWEST)
    assert load(copy, tiny_dataset, "--pretrained-checkpoint", run).iteration == 2


def test_checkpoint_without_any_hashes_is_loaded_unchecked(copy, tiny_dataset, capsys):
    for path in copy.rglob("hashes.json"):
        path.unlink()
    start = load(copy, tiny_dataset)
    assert (start.iteration, start.choice.checked) == (4, False)
    assert "it was not checked" in capsys.readouterr().err


def test_finished_run_is_checked_too(copy, tiny_dataset):
    assert load(copy, tiny_dataset, "--train-iters", 4).iteration == 4
    flip(copy / NEWEST / "__0_0.distcp", random.Random(3))
    assert load(copy, tiny_dataset, "--train-iters", 4).iteration == 2


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_file_is_read_by_one_process(parts, copy):
    files = hashes.read_hashes(copy / NEWEST)["files"]
    shares = [hashes._share(files, part, parts) for part in range(parts)]
    assert sorted(name for share in shares for name in share) == sorted(files)


def make_saved(folder: Path, iterations: list[int]) -> None:
    for iteration in iterations:
        path = folder / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        (path / ".metadata").write_bytes(b"index")
        (path / "metadata.json").write_text("{}")


@pytest.mark.parametrize(
    ("newest", "keep_last", "keep_every", "kept"),
    [
        (60, 2, None, [50, 60, 70]),
        (60, 1, 20, [20, 40, 60, 70]),
        (60, 10, None, [10, 20, 30, 40, 50, 60, 70]),
        (70, 1, None, [70]),
    ],
)
def test_old_checkpoints_are_deleted(newest, keep_last, keep_every, kept, tmp_path):
    """Later ones than the newest of this run (another line, gone back from) are left alone."""
    make_saved(tmp_path, [10, 20, 30, 40, 50, 60, 70])
    choosing.prune(tmp_path, newest, keep_last, keep_every)
    assert choosing.saved_iterations(tmp_path) == kept[::-1]


def write_hashes(folder: Path) -> None:
    infos = hashes.hash_files(folder, hashes.files_within(folder))
    hashes.write_hashes(folder, infos)


def test_what_is_no_checkpoint_counts_for_nothing(tmp_path):
    """With 5 and 10 whole and 11 empty, --keep-last 2 at step 12 deleted 5 and 10."""
    make_saved(tmp_path, [4, 5, 10, 12])
    for name in ("iter_0000009", "iter_0000011"):
        (tmp_path / name).mkdir()
    assert choosing.prune(tmp_path, 12, 2, None) == [5, 4]
    assert choosing.saved_iterations(tmp_path) == [12, 10]
    assert (tmp_path / "iter_0000011").is_dir()


@pytest.mark.parametrize(
    "damage", ["file gone", "file cut", "hashes cut", "no metadata", "no folder"]
)
def test_nothing_is_deleted_before_the_new_one_is_whole(damage, tmp_path):
    make_saved(tmp_path, [4, 5, 10, 12])
    new = tmp_path / "iter_0000012"
    (new / "__0_0.distcp").write_bytes(b"tensors")
    write_hashes(new)
    break_it = {
        "file gone": lambda: (new / "__0_0.distcp").unlink(),
        "file cut": lambda: (new / "__0_0.distcp").write_bytes(b"tensor"),
        "hashes cut": lambda: (new / "hashes.json").write_text("{"),
        "no metadata": lambda: (new / "metadata.json").unlink(),
        "no folder": lambda: shutil.rmtree(new),
    }
    break_it[damage]()
    assert choosing.prune(tmp_path, 12, 1, None) == []
    assert [n for n in choosing.saved_iterations(tmp_path) if n < 12] == [10, 5, 4]


def test_a_damaged_one_is_not_counted(tmp_path):
    make_saved(tmp_path, [4, 5, 10, 12])
    for iteration in (4, 5, 10, 12):
        write_hashes(tmp_path / f"iter_{iteration:07d}")
    (tmp_path / "iter_0000010" / ".metadata").write_bytes(b"ind")
    assert choosing.prune(tmp_path, 12, 2, None) == [4]
    assert choosing.saved_iterations(tmp_path) == [12, 10, 5]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-last", "-1"], "--keep-last -1 is out of range"),
        (["--keep-every", "5"], "give --keep-last too"),
        (["--keep-last", "2", "--save-retain-interval", "5"], "both delete checkpoints"),
        (["--max-faulty-steps", "-1"], "--max-faulty-steps -1 is out of range"),
        (["--spike-deviations", "-1"], "--spike-deviations -1.0 is out of range"),
        (["--hang-timeout", "-1"], "--hang-timeout -1.0 is out of range"),
        (
            ["--save", "/save", "--ckpt-format", "torch"],
            "--ckpt-format torch with --save: checkpoints of that format get no hashes",
        ),
        (["--save", "/save", "--ckpt-format", "torch_dcp"], "give --ckpt-format torch_dist"),
        (["--save", "/save", "--ckpt-format", "fsdp_dtensor"], "give --ckpt-format torch_dist"),
        (
            ["--non-persistent-ckpt-type", "global"],
            "--non-persistent-ckpt-type global is not supported",
        ),
        (
            ["--non-persistent-save-interval", "1"],
            "save more often with --save-minutes or --save-interval, and give --keep-last",
        ),
    ],
)
def test_bad_flags_are_refused(flags, words, copy, tiny_dataset):
    with pytest.raises(ConfigError) as refused:
        load(copy, tiny_dataset, *flags)
    assert words in str(refused.value)


def test_training_facts_are_written(run):
    facts = json.loads((run / NEWEST / "training.json").read_text())
    assert set(facts) == {"data", "dataset_files", "argv", "guard"}
    assert len(facts["guard"]["losses"]) == 4


@pytest.fixture
def damaged(copy) -> Path:
    flip(copy / NEWEST / "__0_0.distcp", random.Random(5))
    return copy


def test_export_of_a_damaged_checkpoint_is_refused(damaged, tmp_path):
    """It would make a model of what is there; training would take another checkpoint, an export must not."""
    with pytest.raises(DataError) as refused:
        megatron_to_hf(damaged, tmp_path / "hf")
    message = str(refused.value)
    assert f"{NEWEST}/__0_0.distcp is damaged: its hash has changed" in message
    assert "use another one of this run (iter_0000002)" in message
    assert not (tmp_path / "hf").exists()
    megatron_to_hf(damaged, tmp_path / "earlier", iteration=2)
    options = Options(check_hashes=False, dry_run=True)
    megatron_to_hf(damaged, tmp_path / "hf", options=options)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "training.json", "hashes.json"])
def test_whatever_file_is_damaged_is_named_to_its_reader(name, copy):
    flip(copy / NEWEST / name, random.Random(6))
    with pytest.raises(DataError, match=rf"{NEWEST}/{re.escape(name)} is damaged"):
        choosing.check_whole(copy / NEWEST)
    assert choosing.check_whole(copy / "iter_0000002")
    (copy / NEWEST / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        choosing.check_whole(copy / NEWEST)


@pytest.mark.parametrize("name", ["hf_config.json", "tokenizer/tokenizer.model"])
def test_evaluation_wants_the_files_beside_the_checkpoint_whole(name, copy):
    assert find_checkpoint(copy).iteration == "4"
    flip(copy / name, random.Random(8))
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        find_checkpoint(copy)


def test_evaluation_reads_what_the_run_recorded_as_newest(copy, caplog):
    (copy / TRACKER).write_text("2")
    assert find_checkpoint(copy).iteration == "4"
    assert "names 2, and the newest checkpoint of this run is 4" in caplog.text
    assert find_checkpoint(copy, ["--ckpt-step", "2"]).iteration == "2"


@pytest.mark.slow
def test_evaluation_of_a_damaged_checkpoint_is_refused(damaged, tiny_dataset, run_job, tmp_path):
    """By the tool itself, two processes reading half of the files each."""
    command = ["tools/evaluate_loss.py", "--checkpoint", damaged, "--dataset", tiny_dataset]
    command += ["--context-length", 128, "--max-documents-per-source", 2, "--output"]
    result = run_job(2, [*command, tmp_path / "loss.json"], check=False)
    assert result.returncode
    message = " ".join(result.stderr.split())
    assert f"error: {damaged / NEWEST}/__0_0.distcp is damaged: its hash has changed" in message
    assert "in load_checkpoint" not in message
    assert not (tmp_path / "loss.json").exists()
    (damaged / TRACKER).write_text("2")  # not what Megatron's loader is to follow
    run_job(1, [*command, tmp_path / "loss.json", "--ckpt-step", 2])
    settings = json.loads((tmp_path / "loss.json").read_text())["settings"]
    assert settings["iteration"] == "2"
