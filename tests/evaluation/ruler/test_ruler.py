"""RULER without a model: known answers, what is refused, what is said instead of a wrong 0, resuming."""

import dataclasses
import json
from argparse import Namespace

import numpy as np
import pytest

from megatron_long.commands.evaluate_ruler import build_parser
from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.generation.sample_results import (
    Estimate,
    SampleResult,
    estimate_average,
    estimate_task,
)
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.ruler import prompt_checks, ruler_run
from megatron_long.evaluation.ruler.ruler_definitions import CHAT_TEMPLATES, KINDS, RULER_TASKS
from megatron_long.evaluation.ruler.ruler_drawers import CommonWords
from megatron_long.evaluation.ruler.ruler_report import (
    RulerReport,
    effective_length,
    format_report,
    make_report,
    read_ruler_report,
    write_ruler_report,
)
from megatron_long.tokenizer.loading import HFTokenizer, load_tokenizer
from tests.evaluation.fakes import llama_config

from .ruler_files import VOCAB_SIZE, save_tokenizer, write_inputs
from .solver import Solver

RECALL = [name for name, task in RULER_TASKS.items() if task.kind != "qa"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder without weights, which the checks do not read."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(llama_config(VOCAB_SIZE, 4096)))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def command(model, files, tmp_path):
    """Give the flags of a command on two samples of a length, with others added."""

    def build(*others: object, tasks=RECALL) -> Namespace:
        words = ["--checkpoint", model, "--backend", "hf", "--output-dir", tmp_path / "out"]
        words += [
            "--haystack",
            files.haystack,
            "--squad",
            files.squad,
            "--hotpotqa",
            files.hotpotqa,
        ]
        words += ["--english-words", files.english_words, "--num-samples", 2, "--tasks", *tasks]
        words += ["--context-lengths", 2048, *others]
        return build_parser().parse_args([str(word) for word in words])

    return build


def answer(args: Namespace, force: bool = False, minutes: float | None = None, **options):
    """Run a command with a `Solver` for a model; gives it and the report."""
    _, plan = ruler_run.prepare_ruler(args, [])
    solver = Solver(plan.tokenizer, plan.context_length, **options)
    with ruler_run.resumed(plan, args.output_dir, force=force) as rest:
        rows = ruler_run.answer_samples(
            rest,
            solver,
            args.output_dir / ruler_run.SAMPLES,
            micro_batch_size=2,
            deadline=Deadline.of_minutes(minutes, 0.0) if minutes is not None else Deadline(None),
            on_answered=lambda number: None,
        )
        return solver, ruler_run.write_report(args.output_dir, plan, rows)


@pytest.mark.parametrize(("is_corrupted", "score"), [(False, 100.0), (True, 0.0)])
def test_a_model_that_copies_has_100_and_its_corrupted_twin_0(command, is_corrupted, score):
    _, report = answer(command(), is_corrupted=is_corrupted)
    assert {task: report.estimates[task, 2048].mean for task in RECALL} == dict.fromkeys(
        RECALL, score
    )
    assert (report.averages[2048].mean, report.averages[2048].num_samples) == (
        score,
        2 * len(RECALL),
    )


def test_rows_are_kept_for_audit_and_not_made_again(command, tmp_path):
    tasks = ["niah_multivalue", "qa_1"]
    args = command(tasks=tasks)
    solver, first = answer(args, says=" 0.0 of 1 17")
    assert solver.num_prompts == 4
    log = tmp_path / "out" / "samples.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert {(row["task"], row["index"]) for row in rows} == {
        (task, i) for task in tasks for i in (0, 1)
    }
    assert all(len(row["prompt_sha256"]) == 64 and row["prompt_tokens"] <= 2048 for row in rows)
    assert next(row["score"] for row in rows if row["task"] == "qa_1") == 100.0
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:-1]))
    solver, again = answer(args, says=" 0.0 of 1 17")
    assert solver.num_prompts == 1
    assert again == first == read_ruler_report(tmp_path / "out" / "ruler.json")
    with pytest.raises(ConfigError, match="num_samples 2 there, 3 here"):
        answer(command("--num-samples", 3, tasks=tasks))
    with pytest.raises(ConfigError, match="seed 42 there, 7 here"):
        answer(command("--seed", 7, tasks=tasks))
    other = command("--seed", 7, tasks=tasks)
    assert answer(other, force=True, says=" 0.0")[0].num_prompts == 4


def test_a_run_that_is_stopped_has_no_effective_length(command):
    _, report = answer(command(tasks=RULER_TASKS), minutes=0.0)
    assert not report.is_complete
    assert effective_length(report).startswith("no effective length")


def test_empty_answers_have_no_score(command):
    _, report = answer(command(tasks=["vt", "fwe"]), says="")
    assert report.estimates["vt", 2048] == Estimate(None, num_samples=2, num_empty=2)
    assert report.averages[2048].mean is None
    assert "vt at 2048: every answer is empty, so it has no score" in format_report(report)


def test_too_few_tokens_to_generate_are_refused_before_the_model_is_loaded(command, monkeypatch):
    short = dataclasses.replace(KINDS["niah"], tokens_to_generate=5)
    monkeypatch.setitem(KINDS, "niah", short)
    with pytest.raises(ConfigError, match=r"the answer takes \d+ tokens, and 5 are generated"):
        ruler_run.prepare_ruler(command(tasks=["niah_multiquery"]), [])
    plan = ruler_run.prepare_ruler(
        command("--tokens-to-generate", 90, tasks=["niah_multiquery"]), []
    )[1]
    assert plan.requests[0].tokens_to_generate == 90


def test_a_sample_whose_answer_does_not_fit_has_no_score(command, monkeypatch):
    monkeypatch.setattr(ruler_run, "check_sample", lambda *_: None)
    monkeypatch.setattr(
        ruler_run, "too_long", lambda sample, *_: "too long" if sample.index else ""
    )
    solver, report = answer(command(tasks=["niah_single_1"]))
    assert solver.num_prompts == 1
    cell = report.estimates["niah_single_1", 2048]
    assert (cell.mean, cell.num_samples, cell.num_unscored) == (100, 2, 1)
    assert "1 of 2 samples have no score" in format_report(report)


def test_a_tokenizer_that_cuts_the_prompt_is_found(command, monkeypatch):
    real = HFTokenizer.encode
    monkeypatch.setattr(HFTokenizer, "encode", lambda self, text: real(self, text)[:300])
    with pytest.raises(DataError, match="cuts the text short"):
        ruler_run.prepare_ruler(command(tasks=["niah_multikey_2"]), [])


def test_chat_templates_that_are_not_the_models(command, model, tmp_path, caplog):
    with pytest.raises(
        ConfigError, match=r"<\|begin_of_text\|>, which this tokenizer does not know"
    ):
        ruler_run.prepare_ruler(command("--template", "meta-llama3", tasks=["vt"]), [])
    with pytest.raises(ConfigError, match="has no chat template"):
        ruler_run.prepare_ruler(command("--template", "own", tasks=["vt"]), [])
    save_tokenizer(tmp_path / "chat")
    own = "{% for turn in messages %}User: {{ turn.content }}{% endfor %}\nModel:"
    (tmp_path / "chat" / "chat_template.jinja").write_text(own)
    chat = load_tokenizer(tmp_path / "chat")
    text = prompt_checks.choose_template("own", chat, tmp_path / "chat")
    assert text == "User: {task_template}Model:"
    prompt_checks.choose_template("base", chat, tmp_path / "chat")
    assert "--template base is not the model's own chat template" in caplog.text


def test_markers_of_a_chat_template_are_one_token_each(command, tmp_path):
    """With a tokenizer that knows them, whose own template is RULER's Phi3 but for white space."""
    markers = ("<|user|>", "<|end|>", "<|assistant|>")
    tokenizer = save_tokenizer(tmp_path / "chat", *markers)
    (tmp_path / "chat" / "config.json").write_text(json.dumps(llama_config(VOCAB_SIZE, 4096)))
    own = "<|user|>\n{{ messages[0].content }}<|end|>\n<|assistant|>\n"
    (tmp_path / "chat" / "chat_template.jinja").write_text(own)
    for template in ("Phi3", "own"):
        args = command("--template", template, tasks=["niah_single_1"])
        args.checkpoint = tmp_path / "chat"
        _, plan = ruler_run.prepare_ruler(args, [])
        (sample,) = plan.samples(plan.requests[0], 1)
        assert [list(sample.tokens).count(tokenizer.token_to_id(word)) for word in markers] == [
            1,
            1,
            1,
        ]
        assert sample.tokens[0] == tokenizer.token_to_id("<|user|>")
        assert len(sample.tokens) <= 2048 - 128


def test_the_own_template_frames_the_task(command, model, files, tmp_path):
    from megatron_long.evaluation.ruler.drawing import Request
    from megatron_long.evaluation.ruler.ruler_samples import make_samples

    template = "You are {kind}. User: {task_template}\nModel:"
    request = Request("niah_single_1", RULER_TASKS["niah_single_1"], 2048, 128, template)
    tokenizer = load_tokenizer(model)
    (sample,) = make_samples(request, files, tokenizer.encode, 1)
    assert sample.prompt.startswith("You are {kind}. User: A special magic number is hidden")
    assert "\nModel: The special magic number for" in sample.prompt


@pytest.mark.parametrize(
    ("task", "dropped", "said"),
    [
        ("niah_single_2", "haystack", "--haystack is missing"),
        ("qa_1", "squad", "--squad is missing"),
        ("qa_2", "hotpotqa", "--hotpotqa is missing"),
        ("cwe", "english_words", "--english-words is missing"),
    ],
)
def test_files_that_are_missing_are_asked_for(command, task, dropped, said, monkeypatch):
    args = command(tasks=[task])
    setattr(args, dropped, None)
    monkeypatch.setattr(CommonWords, "probe_size", 9000)
    with pytest.raises(ConfigError, match=said):
        ruler_run.prepare_ruler(args, [])


def test_files_that_are_others_are_refused(command, files, tmp_path):
    args = command(tasks=["qa_1"])
    args.squad = files.hotpotqa
    with pytest.raises(DataError, match="is not the file that is wanted"):
        ruler_run.prepare_ruler(args, [])
    with pytest.raises(ConfigError, match="--num-samples 9999 is above the"):
        ruler_run.prepare_ruler(command("--num-samples", 9999, tasks=["qa_1"]), [])
    with pytest.raises(ConfigError, match="too short for niah_multikey_1"):
        ruler_run.prepare_ruler(command("--context-lengths", 600, tasks=["niah_multikey_1"]), [])


def test_values_that_would_end_in_tracebacks_are_refused(command, files, tmp_path, monkeypatch):
    monkeypatch.setattr(CommonWords, "probe_size", 9000)
    squad = json.loads(files.squad.read_text())
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    (tmp_path / "words.json").write_text('{"0": "one", "1": "two"}')
    for task, name, value, said in (
        ("qa_1", "squad", tmp_path / "squad.json", "'Which part is 0.0.' has no answer"),
        ("qa_1", "squad", tmp_path, "is not a file"),
        ("cwe", "english_words", tmp_path / "words.json", "holds 2 words"),
        ("vt", "seed", -1, "--seed -1 is not from 0"),
        ("niah_single_2", "haystack", tmp_path / "none.txt", "is not a file"),
    ):
        args = command(tasks=[task])
        setattr(args, name, value)
        with pytest.raises((ConfigError, DataError), match=said):
            ruler_run.prepare_ruler(args, [])


def test_essays_from_a_folder_are_those_of_the_json(files, tmp_path):
    from megatron_long.evaluation.ruler.ruler_inputs import RulerInputs

    text = json.loads(files.haystack.read_text())["text"]
    (tmp_path / "a.txt").write_text(text[:1000])
    (tmp_path / "b.txt").write_text(text[1000:])
    assert RulerInputs(tmp_path).essay == files.essay


def test_sentences_of_a_part_are_those_that_it_has_alone(files):
    """Of any number of words, also beyond the end of the essays and with white space around them."""
    for number in [*range(1, 60), 500, 777, len(files.essay), len(files.essay) + 300]:
        words = (files.essay * 2)[:number]
        seen = files.essay_sentences(number)
        assert seen == files.splitter.tokenize(" ".join(words).strip())
    assert len(seen) > 100


def settings(lengths, tasks=tuple(RULER_TASKS)) -> dict:
    return {
        "model": "m",
        "iteration": "hf",
        "tasks": list(tasks),
        "context_lengths": lengths,
        "num_samples": 1,
    }


@pytest.mark.parametrize(
    ("means", "said"),
    [  # averages of models in RULER's README, and the length it gives them
        ((88.1, 85.5, 84.5, 82.7, 75.5, 68.9), "4096"),
        ((98.4, 96.0, 96.2, 94.4, 91.8, 85.6), "131072 or more, the longest measured"),
        ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), "below 4096"),
        ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), "32768"),
        ((87.0, 85.5, 86.0, 81.1, 77.4, 70.0), "4096"),  # a longer one that recovers does not count
    ],
)
def test_effective_length_is_that_of_ruler(means, said):
    lengths = [4096 * 2**place for place in range(6)]
    cells = {
        n: Estimate(mean, mean - 0.01, mean + 0.01) for n, mean in zip(lengths, means, strict=True)
    }
    report = RulerReport(settings(lengths), {}, cells, True)
    assert effective_length(report).startswith(
        f"effective length (average of at least 85.6): {said}"
    )
    wide = {n: Estimate(mean, mean - 40, mean + 40) for n, mean in zip(lengths, means, strict=True)}
    assert "more samples may change it" in effective_length(
        RulerReport(settings(lengths), {}, wide, True)
    )
    part = RulerReport(settings(lengths, ["vt"]), {}, cells, True)
    assert effective_length(part).startswith("no effective length: it takes all 13 tasks")


def row(score: float, index: int = 0, task: str = "vt") -> SampleResult:
    return SampleResult(task, 4096, index, "", 9, ["a"], "said", score)


@pytest.mark.parametrize("truths", [(0.9, 0.5, 0.7), (0.995, 0.99, 1.0), (0.02, 0.0, 0.3)])
def test_intervals_hold_the_truth_as_often_as_they_say(truths):
    """Of 95% intervals over 100 drawn samples a task; near 0 and 100 too, where many runs have no miss."""
    generator = np.random.default_rng(0)
    held = {"task": 0, "average": 0}
    for _ in range(300):
        drawn = generator.random((3, 100)) < np.array(truths)[:, None]
        tasks = [[row(100.0 * hit) for hit in hits] for hits in drawn]
        first, whole = estimate_task(tasks[1]), estimate_average(tasks)
        held["task"] += first.low <= 100 * truths[1] <= first.high
        held["average"] += whole.low <= 100 * np.mean(truths) <= whole.high
        assert whole.mean == pytest.approx(100 * drawn.mean())
    print({name: number / 300 for name, number in held.items()})
    assert min(held.values()) / 300 > 0.9


def test_intervals_of_single_tasks_are_those_of_jeffreys():
    """2.5% and 97.5% points of Beta(k + 1/2, n - k + 1/2), to the error of the draws."""
    for right, low, high in ((100, 97.53, 100.0), (95, 89.39, 98.07), (50, 40.32, 59.68)):
        seen = estimate_task([row(100.0 * (place < right)) for place in range(100)])
        assert (seen.low, seen.high) == (pytest.approx(low, abs=0.5), pytest.approx(high, abs=0.5))


def test_each_task_counts_the_same():
    tasks = [[row(100.0)] * 30, [row(0.0)] * 10]
    assert estimate_average(tasks).mean == 50
    assert estimate_average([*tasks, []]).mean is None


def test_a_report_reads_as_it_was_written(tmp_path):
    report = make_report(settings([4096], ["vt", "fwe"]), [row(50.0), row(100.0, task="fwe")])
    write_ruler_report(tmp_path / "ruler.json", report)
    assert read_ruler_report(tmp_path / "ruler.json") == report
    assert report.averages[4096].mean == 75
    (tmp_path / "ruler.json").write_text('{"kind": "ruler"}')
    with pytest.raises(ConfigError, match="is not a report of evaluate_ruler"):
        read_ruler_report(tmp_path / "ruler.json")


def test_templates_keep_a_place_for_the_task():
    assert all(text.count("{task_template}") == 1 for text in CHAT_TEMPLATES.values())
