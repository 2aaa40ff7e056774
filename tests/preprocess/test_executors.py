"""One code path under every executor: the same bytes."""

import contextlib
import dataclasses
import errno
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.files import process_mark
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.executors import (
    ExecutorOptions,
    _is_queued,
    _job_name,
    _private_folder,
    end_earlier_tasks,
)
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from tests import slurm_cluster
from tests.corpus_fixtures import files_of

REPOSITORY = Path(__file__).resolve().parents[2]

# What sbatch is asked to do, done at once: every task of the array, one after another.
FAKE_SBATCH = """#!{python}
import os, re, subprocess, sys
words, script = sys.argv[1:], sys.argv[-1]
text = open(script).read() if os.path.exists(script) else sys.stdin.read()
last = int(re.search(r"#SBATCH --array=0-(\\d+)", text)[1])
for index in range(last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(index), RUN_OFFSET="0", SLURM_NODELIST="here")
    text = text.replace("srun  -l -n 1 ", "")
    subprocess.run(["bash"], input=text, text=True, env=environment, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
print("Submitted batch job 1")
"""


@pytest.fixture
def config(corpus, model_file):
    mixture = Mixture(
        train_tokens=9000,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=2000,
    )
    return PreprocessConfig(
        inputs=[corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )


def run_on(config, output, **options):
    preprocess(dataclasses.replace(config, execution=ExecutorOptions(**options)), output)
    return files_of(output)


@pytest.fixture
def importable(monkeypatch):
    """Let processes that are started elsewhere find the package."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch, importable):
    pytest.importorskip("datatrove")
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {"sbatch": FAKE_SBATCH.format(python=sys.executable)}
    scripts |= {
        "squeue": "#!/bin/sh\n",
        "scancel": "#!/bin/sh\n",
        "scontrol": "#!/bin/sh\necho here\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr("megatron_long.preprocess.executors.POLL_SECONDS", 0.1)


def test_nobody_else_writes_where_job_files_lie(tmp_path, monkeypatch):
    folder = tmp_path / "logs"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert stat.S_IMODE(_private_folder(folder).stat().st_mode) == 0o700

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", refuse)  # as of a folder of another user
    with pytest.raises(ConfigError, match="cannot be closed to other users"):
        _private_folder(folder)


def test_processes_of_one_number_on_two_nodes_write_different_files(monkeypatch):
    """A task that a lost node still runs, and the one that SLURM started instead."""
    marks = []
    for node in ("a", "b"):
        monkeypatch.setattr("os.uname", lambda node=node: SimpleNamespace(nodename=node))
        marks.append(process_mark())
    assert marks[0] != marks[1]
    assert [len(mark) for mark in marks] == [8, 8]


@pytest.mark.parametrize("tasks", [1, 2])
def test_slurm_through_a_fake_sbatch(tasks, config, tmp_path, fake_slurm):
    preprocess(config, tmp_path / "local")
    made = run_on(config, tmp_path / "out", executor="slurm", tasks=tasks, slurm_partition="x")
    assert made == files_of(tmp_path / "local")


def test_errors_of_slurm_tasks_come_back(config, tmp_path, fake_slurm, write_jsonl, records):
    file = write_jsonl(tmp_path / "in" / "a.jsonl", [*records[:5], {"text": "x"}])
    few = dataclasses.replace(config.mixture, train_tokens=100, valid_tokens_per_source=0)
    config = dataclasses.replace(config, inputs=[file], mixture=few)
    with pytest.raises(DataError, match=r"a\.jsonl:6 has no source"):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")


def test_tasks_of_a_start_that_was_killed_are_ended_first(config, tmp_path, fake_slurm):
    """They would write parts of another plan among those of this one."""
    queue, asked = tmp_path / "queue", tmp_path / "asked"
    scripts = {"squeue": f"cat {queue}", "scancel": f'echo "$@" >> {asked}; : > {queue}'}
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    work, sbatch = tmp_path / "out.work", tmp_path / "bin" / "sbatch"
    whole = sbatch.read_text()
    sbatch.write_text(
        f"#!/bin/sh\necho 1 x preprocess > {queue}; exit 1\n"
    )  # and here it is killed
    with pytest.raises(ConfigError, match="sbatch failed"):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")
    assert not asked.exists()
    sbatch.write_text(whole)
    run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")
    assert asked.read_text() == f"--user={os.getuid()} --name={_job_name(work)}\n"
    assert _job_name(work) != _job_name(tmp_path / "other.work")


def test_tasks_are_not_told_of_the_job_that_started_them(config, tmp_path, fake_slurm, monkeypatch):
    seen = tmp_path / "seen"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\nenv > {seen}\nexit 1\n")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "500")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")  # by which datatrove takes itself for a task
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with pytest.raises(ConfigError, match="sbatch failed"):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")
    names = [line.split("=")[0] for line in seen.read_text().splitlines()]
    assert [name for name in names if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "7"


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, fake_slurm):
    """That of the waiting run may start again; a resumed one cannot know whether tasks run."""
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert _is_queued(tmp_path) is None
    (tmp_path / "logs" / "1").mkdir(parents=True)
    (tmp_path / "logs" / "1" / "executor.pik").touch()
    with pytest.raises(ConfigError, match=r"squeue does not answer.*scancel --name=.*then remove"):
        end_earlier_tasks(tmp_path)


def test_tasks_end_with_the_run(config, tmp_path, fake_slurm, monkeypatch):
    asked = tmp_path / "asked"
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 1\n")
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\nkill -INT {os.getpid()}; echo 1\n")
    (tmp_path / "bin" / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    with pytest.raises(KeyboardInterrupt):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")
    assert _job_name(tmp_path / "out.work") in asked.read_text()


def test_an_sbatch_that_fails(config, tmp_path, fake_slurm):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--executor slurm: sbatch failed"):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")


def test_tasks_that_the_cluster_ended(config, tmp_path, fake_slurm):
    text = "#!/bin/sh\necho Submitted batch job 1\n"
    (tmp_path / "bin" / "sbatch").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"3 of 3 items of stage tokens\.0 .* same command again"):
        run_on(config, tmp_path / "out", executor="slurm", slurm_partition="x")


@pytest.fixture
def real_slurm(tmp_path, importable, monkeypatch):
    """A cluster of this one machine, ended at the end of the test."""
    pytest.importorskip("datatrove")
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        cluster = slurm_cluster.start(tmp_path / "slurm", cpus=os.cpu_count() or 1)
        try:
            environment = stack.enter_context(cluster)
        except slurm_cluster.NotStarted as error:
            pytest.skip(f"SLURM does not start here: {error}")
        monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        yield


@pytest.mark.slow
def test_slurm_on_a_cluster_of_one_node(config, tmp_path, real_slurm):
    preprocess(config, tmp_path / "local")
    made = run_on(
        config,
        tmp_path / "out",
        executor="slurm",
        tasks=3,
        workers=2,
        slurm_partition=slurm_cluster.PARTITION,
        memory_gb=1,
    )
    assert made == files_of(tmp_path / "local")


@pytest.mark.slow
def test_ray_on_this_machine(config, tmp_path, importable):
    pytest.importorskip("ray")
    pytest.importorskip("datatrove")
    preprocess(config, tmp_path / "local")
    made = run_on(config, tmp_path / "out", executor="ray", tasks=3, workers=2, memory_gb=1)
    assert made == files_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "mpi"}, "--executor mpi: choose one of local, slurm, ray"),
        ({"tasks": 0}, "--tasks 0 is too small"),
        ({"workers": 0}, "--workers 0 is too small"),
        ({"executor": "slurm"}, "needs --slurm-partition"),
    ],
)
def test_options_check_themselves(options, message):
    with pytest.raises(ConfigError, match=message):
        ExecutorOptions(**options)


def test_a_missing_package_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--executor ray needs `pip install ray`"):
        run_on(config, tmp_path / "out", executor="ray")
    preprocess(config, tmp_path / "local", lambda progress: None)


def test_urls_in_and_out(config, corpus, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    preprocess(config, tmp_path / "local")
    memory = fsspec.filesystem("memory")
    try:
        for path in corpus.rglob("*.jsonl*"):
            name = path.relative_to(corpus).as_posix()
            memory.pipe_file(f"/bucket/in/{name}", path.read_bytes())
        remote = dataclasses.replace(
            config, inputs=["memory://bucket/in"], work_dir=tmp_path / "work"
        )
        preprocess(remote, "memory://bucket/out")
        memory.get("/bucket/out/", f"{tmp_path / 'copy'}/", recursive=True)
        assert files_of(tmp_path / "copy") == files_of(tmp_path / "local")
    finally:
        memory.store.clear()
    with pytest.raises(ConfigError, match="--output memory://bucket/out is a URL: give --work-dir"):
        preprocess(config, "memory://bucket/out")
