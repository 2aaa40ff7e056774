"""The two command-line tools, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run_tool(name, *words):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, f"tools/{name}.py", *map(str, words)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def words(corpus, model_file, tmp_path):
    return {
        "--input": corpus,
        "--tokenizer": model_file,
        "--output": tmp_path / "out",
        "--train-tokens": "4K",
        "--long-threshold": 300,
        "--short-keep-ratio": 0.5,
        "--valid-tokens-per-source": "1K",
    }


def flags(words):
    return [word for pair in words.items() for word in pair]


def test_make_inspect_plot_and_refuse_to_overwrite(words, tmp_path):
    made = run_tool("preprocess_mix", *flags(words))
    assert made.returncode == 0, made.stderr
    assert "4,000 training tokens" in made.stdout
    assert [line.split()[0] for line in made.stdout.splitlines()[1:5]] == [
        "Book",
        "C4",
        "GitHub",
        "all",
    ]
    again = run_tool("preprocess_mix", *flags(words))
    assert again.returncode == 2
    assert "exists already" in " ".join(again.stderr.split())
    assert run_tool("preprocess_mix", *flags(words), "--force").returncode == 0
    plot = tmp_path / "figure.png"
    shown = run_tool("inspect_dataset", "--dataset", words["--output"], "--plot", plot, "--verify")
    assert shown.returncode == 0, shown.stderr
    assert set(made.stdout.splitlines()[1:5]) <= set(shown.stdout.splitlines())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "out"]


def test_a_dry_run_of_all_tells_what_the_run_tells(words, tmp_path, records):
    """Bad documents and files that are left out, sources that miss their share: figures and warnings."""
    lines = [json.dumps(record) for record in records]
    text = "\n".join([*lines[:200], "{}", *lines[200:], '{"text": 1}'])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "b.jsonl.xz").touch()
    del words["--short-keep-ratio"]
    words |= {"--input": tmp_path / "in", "--long-token-share": 0.99, "--train-tokens": "40K"}
    extra = ["--on-bad-document", "skip", "--on-unread-file", "skip"]
    dry = run_tool("preprocess_mix", *flags(words), *extra, "--dry-run")
    made = run_tool("preprocess_mix", *flags(words), *extra)
    assert (dry.returncode, made.returncode) == (0, 0), dry.stderr + made.stderr
    assert dry.stdout.splitlines()[:5] == made.stdout.splitlines()[:5]
    notes = [line[6:] for line in dry.stdout.splitlines() if line.startswith("note: ")]
    *warnings, bad = notes
    assert warnings == manifest_of(words)["warnings"]
    assert any("out of reach" in warning for warning in warnings)
    assert bad.startswith(
        "bad documents that are left out: 2 (first: a.jsonl:201 has no text string"
    )
    assert manifest_of(words)["documents_bad"] == 2


def test_dry_run_prints_the_table_and_writes_nothing(words, tmp_path):
    result = run_tool("preprocess_mix", *flags(words), "--dry-run", "--source-shares", "natural")
    assert result.returncode == 0, result.stderr
    assert "dry run" in result.stdout
    assert "4,000" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "/nowhere/a.jsonl"}, "--input /nowhere/a.jsonl does not exist"),
        ({"--tokenizer": "/nowhere/t.model"}, "--tokenizer /nowhere/t.model: no tokenizer there"),
        ({"--train-tokens": "5X"}, "--train-tokens '5X' is not a number of tokens"),
        ({"--train-tokens": "5B"}, "--train-tokens 5B is more than the corpus can hold"),
        ({"--source-shares": "slimpajama"}, "names CommonCrawl, Wikipedia, ArXiv"),
        ({"--source-shares": "/nowhere.yaml"}, "--source-shares /nowhere.yaml does not exist"),
        ({"--source-key": "meta.none"}, "a.jsonl:1 has no source"),
        ({"--strategy": "best"}, "--strategy best: choose one of per-source"),
        ({"--input": ""}, "--input '' is empty"),
        ({"--output": "xyz://a/b", "--work-dir": "/nowhere/work"}, "xyz://a/b: Protocol not known"),
        ({"--source-key": ""}, "--source-key '' has an empty part"),
        ({"--text-key": "a..b"}, "--text-key 'a..b' has an empty part"),
        ({"--cut-length": "4K"}, "--cut-length 4096 has no effect with --strategy per-source"),
        (
            {"--strategy": "original"},
            "--short-keep-ratio 0.5 has no effect with --strategy original",
        ),
        ({"--strategy": "cut"}, "--short-keep-ratio 0.5 has no effect with --strategy cut"),
        (
            {"--missing-sources": "drop"},
            "--missing-sources drop has no effect with --source-shares",
        ),
        (
            {"--train-tokens": "2"},
            "--train-tokens 2 has no room for a document, which is BOS and EOD",
        ),
    ],
)
def test_errors_are_one_paragraph_and_status_2(changes, message, words, tmp_path):
    result = run_tool("preprocess_mix", *flags(words | changes))
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    # What was read so far is kept, for the same command; not if that can never end well.
    kept = ["out.work"] if changes.get("--source-key") else []
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_inspect_refuses_what_is_no_dataset(tmp_path):
    result = run_tool("inspect_dataset", "--dataset", tmp_path)
    assert result.returncode == 2
    assert "is not a dataset" in result.stderr


def manifest_of(words):
    return json.loads((Path(words["--output"]) / "manifest.json").read_text("utf-8"))


@pytest.mark.parametrize(
    "extra",
    [
        ["--strategy", "original"],
        ["--strategy", "cut", "--cut-length", "100"],
        ["--strategy", "global"],
        ["--strategy", "upsample-sources", "RedPajamaBook=0.5", "C4=0.1"],
        ["--strategy", "per-source", "--long-token-share", "0.5"],
    ],
)
def test_every_strategy_from_the_command_line(extra, words):
    if extra[1] not in ("per-source", "global") or "--long-token-share" in extra:
        del words["--short-keep-ratio"]
    made = run_tool("preprocess_mix", *flags(words), *extra)
    assert made.returncode == 0, made.stderr
    manifest = manifest_of(words)
    assert manifest["train"]["num_tokens"] == 4000
    assert manifest["mixture"]["strategy"] == extra[1]
    sources = manifest["sources"]
    if "upsample-sources" in extra:
        assert sources["Book"]["share_got"] == 0.5
        assert sources["C4"]["share_got"] == 0.1
    if "cut" in extra:
        assert all(info["tokens_by_length_after"][7:] == [] for info in sources.values())
    if "--long-token-share" in extra:
        assert all(abs(info["long_share_after"] - 0.5) < 0.3 for info in sources.values())


def test_one_folder_per_source_and_parquet(words, tmp_path, records):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts: dict[str, list[str]] = {}
    for record in records:
        name = record["meta"]["redpajama_set_name"]
        texts.setdefault(name, []).append(record["text"])
    for name, found in texts.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"text": found}), tmp_path / "in" / name / "0.parquet")
    words |= {"--input": tmp_path / "in"}
    made = run_tool("preprocess_mix", *flags(words), "--source-from-folder", "--keep-work")
    assert made.returncode == 0, made.stderr
    manifest = manifest_of(words)
    assert sorted(manifest["sources"]) == ["Book", "C4", "GitHub"]
    assert [item["name"] for item in manifest["inputs"]] == [
        f"RedPajama{name}/0.parquet" for name in ("Book", "C4", "Github")
    ]
    assert all(len(item["xxh3_128"]) == 32 for item in manifest["inputs"])
    assert (tmp_path / "out.work" / "tokens.0" / "000000" / "info.json").exists()
    both = run_tool("preprocess_mix", *flags(words), "--source-from-folder", "--source-key", "x")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr
    both = run_tool("preprocess_mix", *flags(words), "--long-token-share", "0.5")
    assert both.returncode == 2
    assert "--short-keep-ratio and --long-token-share exclude each other" in both.stderr


def test_every_kind_of_file_in_one_corpus(words, tmp_path, records, write_jsonl):
    """As Dolma and `datasets` name their files; what is read and what is not is told first."""
    arrow = pytest.importorskip("pyarrow")
    corpus = tmp_path / "in"
    write_jsonl(corpus / "web" / "a.json.gz", records[:100])
    write_jsonl(corpus / "web" / "b.json.zst", records[100:200])
    write_jsonl(corpus / "web" / "c.ndjson", records[200:300])
    (tmp_path / "saved").mkdir()
    for part, start in enumerate((300, 450)):
        table = arrow.Table.from_pylist(records[start : start + 150])
        name = f"data-0000{part}-of-00002.arrow"
        with arrow.ipc.new_stream(tmp_path / "saved" / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (corpus / "linked").symlink_to(tmp_path / "saved")
    words |= {"--input": corpus}
    made = run_tool("preprocess_mix", *flags(words), "--workers", 2)
    assert made.returncode == 0, made.stderr
    assert made.stderr.splitlines()[0].startswith("--input: 5 files, ")
    assert "not read: 1 x dataset_info.json: describes a dataset of Hugging Face" in made.stderr
    sources = manifest_of(words)["sources"]
    plain = run_tool(
        "preprocess_mix", *flags(words | {"--input": write_all(tmp_path, records)}), "--force"
    )
    assert plain.returncode == 0, plain.stderr
    for name, info in manifest_of(words)["sources"].items():
        for field in ("documents_in", "tokens_in", "bytes_in"):
            assert sources[name][field] == info[field]
    (corpus / "web" / "d.jsonl.xz").touch()
    refused = run_tool("preprocess_mix", *flags(words), "--force", "--dry-run")
    assert refused.returncode == 2
    assert "d.jsonl.xz is of a kind that cannot be read" in " ".join(refused.stderr.split())
    skipped = run_tool("preprocess_mix", *flags(words), "--force", "--on-unread-file", "skip")
    assert skipped.returncode == 0
    told = "not read: 1 x d.jsonl.xz: is of a kind that cannot be read"
    assert told in skipped.stderr.splitlines()
    assert manifest_of(words)["warnings"] == [told]


def write_all(folder, records):
    (folder / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "all.jsonl"


def test_shares_from_yaml_and_repeats(words, tmp_path):
    (tmp_path / "shares.yaml").write_text("shares: {Book: 8, C4: 1, GitHub: 1}\n", "utf-8")
    words |= {"--source-shares": tmp_path / "shares.yaml", "--train-tokens": "90K"}
    del words["--short-keep-ratio"]
    words["--strategy"] = "original"
    short = run_tool("preprocess_mix", *flags(words))
    assert short.returncode == 2
    passes = re.findall(r"or --allow-repeat (\d+)", " ".join(short.stderr.split()))
    made = run_tool("preprocess_mix", *flags(words), "--allow-repeat", *passes)
    assert made.returncode == 0, made.stderr
    book = manifest_of(words)["sources"]["Book"]
    assert book["passes"] == int(passes[0]) > 1
    assert book["tokens_repeated"] > 0
    assert book["share_got"] == 0.8


@pytest.mark.parametrize("word", ["Book", "=0.5", "Book=much"])
def test_malformed_upsampling(word, words):
    del words["--short-keep-ratio"]
    result = run_tool("preprocess_mix", *flags(words), "--strategy", "upsample-sources", word)
    assert result.returncode == 2
    assert "write NAME=SHARE" in result.stderr


def test_a_source_upsampled_twice(words):
    twice = ("Book=0.5", "RedPajamaBook=0.2")
    del words["--short-keep-ratio"]
    result = run_tool("preprocess_mix", *flags(words), "--strategy", "upsample-sources", *twice)
    assert result.returncode == 2
    assert "names RedPajamaBook twice" in " ".join(result.stderr.split())


def test_progress_in_a_log_and_on_a_terminal(capsys, monkeypatch):
    from megatron_long.preprocess import progress_bar
    from megatron_long.preprocess.monitor import RunProgress

    progress = RunProgress("tokens.0", 1, 4, 10, 40, 30, 8, {"Book": 8}, {"Book": 20})
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0.0)
    with progress_bar.ProgressBars() as bars:
        bars.update(progress)
    assert "tokens.0: 1 of 4 files" in capsys.readouterr().err
    monkeypatch.setattr(progress_bar.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar.ProgressBars() as bars:
        bars.update(progress)
    shown = capsys.readouterr().err
    assert "Book" in shown
    assert "tokens/s" in shown
