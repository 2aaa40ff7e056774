"""Corpus and dataset in an object store that fails: a real server behind a proxy that injects faults."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from tests import s3_store
from tests.corpus_fixtures import files_of
from tests.launched import wait_until

pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

REPOSITORY = Path(__file__).resolve().parents[2]
OUT = "s3://bucket/out"


@pytest.fixture(scope="module")
def server():
    with s3_store.start() as server:
        yield server


@pytest.fixture
def store(server, corpus, monkeypatch):
    """The server with the corpus in a bucket, and nothing else."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron_long.corpus.stores.RETRY_SECONDS", (0, 0))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    options = {"read_timeout": 2, "retries": {"max_attempts": 0}}
    monkeypatch.setattr("fsspec.config.conf", {"s3": {"config_kwargs": options}})
    s3fs.S3FileSystem.clear_instance_cache()
    files = server.files()
    files.mkdir("bucket")
    for path in corpus.rglob("*.*"):
        files.pipe_file(f"bucket/in/{path.relative_to(corpus)}", path.read_bytes())
    server.requests.clear()
    yield server
    server.heal()
    files.rm("bucket", recursive=True)


@pytest.fixture(scope="module")
def local(corpus, model_file, tmp_path_factory):
    """The files of the dataset made of the same corpus on this machine."""
    output = tmp_path_factory.mktemp("local") / "out"
    preprocess(config_of(corpus, model_file), output)
    return files_of(output)


@pytest.fixture
def config(model_file, tmp_path):
    return dataclasses.replace(config_of("s3://bucket/in", model_file), work_dir=tmp_path / "work")


def config_of(corpus, model_file):
    mixture = Mixture(
        train_tokens=9000,
        short_keep_ratio=0.3,
        long_threshold_tokens=300,
        valid_tokens_per_source=2000,
    )
    return PreprocessConfig(
        inputs=[corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )


def uploaded(store, tmp_path):
    store.heal()
    store.files().get("bucket/out/", f"{tmp_path / 'copy'}/", recursive=True)
    return files_of(tmp_path / "copy")


def names(store):
    return {path.removeprefix("bucket/out/") for path in store.files().find("bucket/out")}


def is_put(method, path):
    return method == "PUT" and "/bucket/out/" in path and ".write-test" not in path


@pytest.mark.parametrize("kind", ["503", "cut", "unanswered", "stall"])
def test_a_fault_here_and_there_changes_nothing(kind, store, config, local, tmp_path):
    count, every = itertools.count(1), 40 if kind == "stall" else 7
    store.fail(lambda *request: kind if request[0] != "HEAD" and next(count) % every == 0 else None)
    preprocess(config, OUT)
    assert uploaded(store, tmp_path) == local
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("on_bad_document", ["stop", "skip"])
def test_a_store_that_fails_while_reading_is_not_a_damaged_file(
    on_bad_document, store, config, local, tmp_path
):
    config = dataclasses.replace(config, on_bad_document=on_bad_document)
    last = max(path for path in store.files().find("bucket/in"))
    gets = itertools.count(1)  # the first are of the sample

    def fault(method, path):
        return "cut" if method == "GET" and last in path and next(gets) > 1 else None

    store.fail(fault)
    with pytest.raises(
        ConfigError, match=r"s3://bucket/in/.*: the store fails .* resumes where it was"
    ):
        preprocess(config, OUT)
    assert names(store) == set()
    store.heal()
    preprocess(config, OUT)
    assert uploaded(store, tmp_path) == local


def test_a_store_that_fails_while_reading_a_table(store, config, records):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(records)
    with store.files().open("bucket/tables/a.parquet", "wb") as file:
        parquet.write_table(table, file)
    config = dataclasses.replace(config, inputs=["s3://bucket/tables"], on_bad_document="skip")
    gets = itertools.count(1)

    def fault(method, path):
        return "503" if method == "GET" and "a.parquet" in path and next(gets) > 1 else None

    store.fail(fault)
    with pytest.raises(ConfigError, match=r"a\.parquet: the store fails .* resumes where it was"):
        preprocess(config, OUT)


@pytest.mark.parametrize("kind", ["503", "cut", "unanswered"])
@pytest.mark.parametrize("at", [1, 5, "manifest.json"])
def test_an_upload_that_fails_resumes_with_what_is_missing(
    kind, at, store, config, local, tmp_path
):
    puts = []

    def fault(method, path):
        if not is_put(method, path):
            return None
        puts.append(path)
        return kind if (at in path if isinstance(at, str) else len(puts) >= at) else None

    store.fail(fault)
    with pytest.raises(
        ConfigError, match=r"--output s3://bucket/out: the store fails .* same command"
    ):
        preprocess(config, OUT)
    assert kind == "unanswered" or "manifest.json" not in names(store)
    before = names(store)
    store.heal()
    store.requests.clear()
    preprocess(config, OUT)
    again = {path.rpartition("/out/")[2] for method, path in store.requests if is_put(method, path)}
    unsure = {puts[-1].rpartition("/out/")[2], "manifest.json"}
    assert again - unsure == set(local) - before - unsure
    assert uploaded(store, tmp_path) == local


def test_a_run_that_is_killed_while_it_uploads(store, config, local, tmp_path, model_file):
    words = ["--input", "s3://bucket/in", "--output", OUT, "--work-dir", config.work_dir]
    words += ["--tokenizer", model_file, "--engine", "reference", "--short-keep-ratio", 0.3]
    words += ["--train-tokens", 9000, "--long-threshold", 300, "--valid-tokens-per-source", 2000]
    command = [sys.executable, "tools/preprocess_mix.py", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    store.fail(lambda *request: "stall" if is_put(*request) and "train.bin" in request[1] else None)
    run = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    wait_until(
        lambda: (
            any("train.bin" in path for _, path in list(store.requests)) or run.poll() is not None
        )
    )
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert "manifest.json" not in names(store)
    assert names(store)
    store.heal()
    assert subprocess.run(command, cwd=REPOSITORY, env=environment).returncode == 0
    assert uploaded(store, tmp_path) == local


def test_what_is_there_is_replaced_with_force_only(store, config, local, tmp_path):
    files = store.files()
    for name, what in (("notes.txt", "holds notes.txt"), ("manifest.json", "exists already")):
        files.pipe_file(f"bucket/out/{name}", b"{}")
        with pytest.raises(ConfigError, match=f"--output s3://bucket/out {what}.*--force"):
            preprocess(config, OUT)
    assert not (tmp_path / "work").exists()
    store.requests.clear()
    preprocess(dataclasses.replace(config, force=True), OUT)
    changes = [
        path for method, path in store.requests if is_put(method, path) or method == "DELETE"
    ]
    changes = [path for path in changes if ".write-test" not in path]
    assert changes[0] == changes[-1] == "/bucket/out/manifest.json"
    assert uploaded(store, tmp_path) == local


def test_an_object_that_another_program_writes_meanwhile(store, config, tmp_path):
    def fault(method, path):
        if is_put(method, path) and "train.idx" in path:
            store.files().pipe_file("bucket/out/documents.npy", b"another run's")

    store.fail(fault)
    with pytest.raises(ConfigError, match=r"another program changed documents\.npy"):
        preprocess(config, OUT)
    assert "manifest.json" not in names(store)


def test_a_corpus_that_changes_during_the_run(store, config):
    name = min(store.files().find("bucket/in"))

    def replace(progress):
        if progress.stage == "write":
            files = store.files()
            files.pipe_file(name, files.cat_file(name).replace(b"a", b"e"))

    with pytest.raises(DataError, match="changed while it was read"):
        preprocess(config, OUT, replace)


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_what_is_wrong_is_said_before_the_work_starts(flag, store, config, tmp_path, monkeypatch):
    def refused(message, name="s3://bucket/x"):
        corpus, output = (name, OUT) if flag == "--input" else (config.inputs[0], name)
        with pytest.raises((ConfigError, DataError), match=message):
            preprocess(dataclasses.replace(config, inputs=[corpus]), output)
        assert not (tmp_path / "work").exists()

    refused(f"{flag} s3://none/x does not exist", "s3://none/x")
    assert not store.files().exists("none")  # s3fs creates buckets with folders
    refused("s4://bucket/x: Protocol not known: s4; give", "s4://bucket/x")
    if flag == "--output":
        refused("names no folder in the bucket; give s3://bucket/NAME", "s3://bucket/")
    store.fail(lambda method, path: "403" if "/x" in path else None)
    refused(f"{flag} s3://bucket/x: access is denied .*AWS_ACCESS_KEY_ID")
    store.heal()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    refused("access is denied .NoCredentialsError.*AWS_ACCESS_KEY_ID")
