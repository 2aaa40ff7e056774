import math
from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.needle.cases import PROMPTS, build_cases
from megatron_long.evaluation.needle.needle_scores import score_cases
from megatron_long.evaluation.needle.needle_tasks import NeedleTask

from .fakes import (
    CORRECT_LOSS,
    WRONG_LOSS,
    FakeScorer,
    WordTokenizer,
    copy_predictions,
    make_story,
    near_copy_predictions,
)

STORY = make_story(400)
OPENING = PROMPTS["paper"][0]
LENGTHS = (130, 257, 600)
DEPTHS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def cases(tokenizer):
    return build_cases(STORY, tokenizer, NeedleTask(), LENGTHS, DEPTHS)


def test_each_case_has_exactly_its_length_and_all_its_parts(cases, tokenizer):
    task = NeedleTask()
    assert [case.context_length for case in cases] == [n for n in LENGTHS for _ in DEPTHS]
    for case in cases:
        row = case.row()
        assert len(row.tokens) == len(row.labels) == case.context_length
        text = tokenizer.decode(row.tokens)
        assert text.startswith("<s>" + OPENING)
        assert text.count(task.needle) == 2  # hidden, and as lead and answer
        assert text.endswith(
            f" </book>.\n Based on the content of the book, Question: {task.question}\n"
            f"Answer: The best thing to do in San Francisco is {task.answer}"
        )


def test_only_the_answer_is_scored(cases, tokenizer):
    for case in cases:
        row = case.row()
        scored = np.flatnonzero(row.labels != -1)
        assert tokenizer.decode(row.labels[scored]).strip() == NeedleTask().answer
        assert (row.labels[scored] == row.tokens[scored + 1]).all()
        assert scored[-1] == case.context_length - 2


def test_the_needle_stands_between_sentences_near_its_depth(cases, tokenizer):
    for case in cases:
        text = tokenizer.decode(case.row().tokens)
        before, after, _ = text.split(" " + NeedleTask().needle)
        assert before == "<s>" + OPENING or before.endswith(".")
        # At depth 0 the window's first sentence may lack its beginning.
        assert case.depth == 0 or after.startswith((" ", "\n"))
        assert len(tokenizer.encode(before[3:])) + 1 == case.needle_start
        assert abs(case.actual_depth - case.depth) <= 15 / (case.context_length - 100)
    assert [case.actual_depth for case in cases if case.depth in (0, 1)] == [0.0, 1.0] * 3


def test_a_copying_model_answers_everywhere(cases):
    results = score_cases(FakeScorer(copy_predictions, 640), cases, micro_batch_size=1)
    assert [(r.context_length, r.depth) for r in results] == [
        (n, d) for n in LENGTHS for d in DEPTHS
    ]
    assert all(result.is_exact for result in results)
    assert {result.token_accuracy for result in results} == {1.0}
    assert {result.log_likelihood for result in results} == {-CORRECT_LOSS}


def test_a_model_without_memory_answers_nowhere(cases):
    scorer = FakeScorer(lambda tokens: np.full(len(tokens), -2), 640)
    results = score_cases(scorer, cases)
    assert not any(result.is_exact for result in results)
    assert {result.log_likelihood for result in results} == {-WRONG_LOSS}


def test_a_copying_model_that_slips_once_is_not_exact(cases):
    def predict(tokens):
        predicted = copy_predictions(tokens)
        predicted[np.flatnonzero(tokens)[-3]] = -2  # one word of the answer
        return predicted

    results = score_cases(FakeScorer(predict, 640), cases)
    number = cases[0].num_answer_tokens
    assert not any(result.is_exact for result in results)
    assert {result.token_accuracy for result in results} == {(number - 1) / number}
    expected = -(CORRECT_LOSS * (number - 1) + WRONG_LOSS) / number
    assert results[0].log_likelihood == pytest.approx(expected)


def test_a_short_sighted_model_answers_where_the_needle_is_near(cases):
    results = score_cases(FakeScorer(near_copy_predictions(200), 640), cases)
    for case, result in zip(cases, results, strict=True):
        question_length = sum(
            map(len, (case.question_tokens, case.lead_tokens, case.answer_tokens))
        )
        distance = case.context_length - question_length - case.needle_start
        if not 140 < distance < 200:
            assert result.is_exact == (distance <= 140), (case.context_length, case.depth)
    assert 0 < sum(result.is_exact for result in results) < len(results)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_short_cells_share_a_batch_and_nothing_changes(cases, micro_batch_size):
    scorer = FakeScorer(near_copy_predictions(200), 640)
    results = score_cases(scorer, cases, micro_batch_size=micro_batch_size)
    assert results == score_cases(FakeScorer(near_copy_predictions(200), 640), cases)
    assert sum(rows for rows, _ in scorer.shapes) == len(cases)
    assert all(rows * length <= micro_batch_size * 640 for rows, length in scorer.shapes)
    if micro_batch_size == 1:  # four cells of 600, four of 257 by two, four of 130 in one
        assert [rows for rows, _ in scorer.shapes] == [1, 1, 1, 1, 2, 2, 4]
        assert sum(rows * length for rows, length in scorer.shapes) < 1.03 * 4 * (130 + 257 + 600)


def test_cells_are_split_over_replicas_and_put_back_in_order(cases):
    """Each replica in turn, with what the earlier ones gathered: the last one sees all results."""
    alone = score_cases(FakeScorer(near_copy_predictions(200), 640), cases)
    shapes, seen = [], {}
    for rank in range(3):
        scorer = FakeScorer(near_copy_predictions(200), 640, rank=rank, size=3)
        for result in score_cases(scorer, cases):
            assert result.key not in seen
            seen[result.key] = result
        shapes.append(scorer.shapes)
    assert [seen[case.key] for case in cases] == alone
    assert [len(part) for part in shapes] == [3, 2, 2]  # seven batches, dealt out in rounds


def test_no_bos_when_the_model_has_none():
    tokenizer = WordTokenizer(bos_id=None)
    case = build_cases(STORY, tokenizer, NeedleTask(), [200], [0.5])[0]
    assert tokenizer.decode(case.row().tokens).startswith(OPENING)


def test_own_needle(tokenizer):
    task = NeedleTask("The code of the vault is 4 8 1 5.", "What is the code?", "4 8 1 5")
    case = build_cases(STORY, tokenizer, task, [200], [0.5])[0]
    text = tokenizer.decode(case.row().tokens)
    assert text.endswith("Question: What is the code?\nAnswer: The code of the vault is 4 8 1 5")
    assert score_cases(FakeScorer(copy_predictions, 256), [case])[0].is_exact


def test_haystack_too_short_names_the_length_it_can_do(tokenizer):
    story = make_story(30)
    with pytest.raises(ConfigError, match="it can do lengths up to") as info:
        build_cases(story, tokenizer, NeedleTask(), [5000], [0.5])
    longest = int(str(info.value).split("lengths up to ")[1].split(":")[0])
    assert build_cases(story, tokenizer, NeedleTask(), [longest], [0.5])
    with pytest.raises(ConfigError, match="it can do lengths up to"):
        build_cases(story, tokenizer, NeedleTask(), [longest + 1], [0.5])


def test_length_without_room_names_the_least(tokenizer):
    with pytest.raises(
        ConfigError, match=r"give --min-length .* or --context-lengths above"
    ) as info:
        build_cases(STORY, tokenizer, NeedleTask(), [20, 200], [0.5])
    least = int(str(info.value).rsplit(" ", 1)[1])
    assert build_cases(STORY, tokenizer, NeedleTask(), [least + 1], [0.5])


def test_haystack_that_holds_the_needle_is_refused(tokenizer):
    spoiled = STORY + " " + NeedleTask().needle.replace(" sit ", "\nsit ")
    with pytest.raises(ConfigError, match="already contains"):
        build_cases(spoiled, tokenizer, NeedleTask(), [200], [0.5])


def test_answer_must_be_in_the_needle():
    with pytest.raises(ConfigError, match="is not part of --needle"):
        NeedleTask(answer="drink tea")
    with pytest.raises(ConfigError, match="--question is empty"):
        NeedleTask(question=" ")


def test_answer_that_the_tokenizer_changes_is_refused(tokenizer):
    class Lowercasing(WordTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    with pytest.raises(ConfigError, match="does not survive the tokenizer"):
        build_cases(STORY, Lowercasing(), NeedleTask(), [200], [0.5])
    # Letters on both sides of the join: no token boundary between the lead and the answer.
    task = NeedleTask("The word is supercalifragilistic.", "Which?", "fragilistic.")
    with pytest.raises(ConfigError, match="does not survive the tokenizer"):
        build_cases(STORY, tokenizer, task, [200], [0.5])


def test_an_answer_glued_to_its_lead_is_found_by_a_copying_model(tokenizer):
    task = NeedleTask("The access code of the vault:XYZ-774.", "Which code?", "XYZ-774.")
    case = build_cases(STORY, tokenizer, task, [200], [0.5])[0]
    assert tokenizer.decode(case.answer_tokens) == "XYZ-774."
    assert tokenizer.decode(case.row().tokens).endswith(
        "Answer: The access code of the vault:XYZ-774."
    )
    assert score_cases(FakeScorer(copy_predictions, 256), [case])[0].is_exact


@pytest.mark.parametrize(
    ("needle", "answer"), [("Tea at four.", "Tea at four."), ("Say  \n tea.", "tea.")]
)
def test_an_answer_keeps_the_space_before_it(needle, answer, tokenizer):
    case = build_cases(STORY, tokenizer, NeedleTask(needle, "What?", answer), [200], [0.5])[0]
    assert tokenizer.decode(case.row().tokens).endswith(f"Answer: {needle}")


def test_an_answer_whose_tokens_the_needle_does_not_hold_is_refused(tokenizer):
    """It ends within a word of the needle."""
    task = NeedleTask("The word is supercalifragilistic.", "Which?", "supercali")
    with pytest.raises(ConfigError, match="other tokens after the question than in --needle"):
        build_cases(STORY, tokenizer, task, [200], [0.5])


def test_a_loss_that_is_not_finite_is_an_error(cases):
    class Broken(FakeScorer):
        def score(self, tokens, labels):
            scores = super().score(tokens, labels)
            scores.losses[labels != -1] = math.nan
            return scores

    with pytest.raises(DataError, match="context length 600"):
        score_cases(Broken(copy_predictions, 640), cases)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["sentencepiece", "byte-level"])
def test_real_tokenizers_give_running_text(name, prompt, tmp_path: Path):
    """The pieces, tokenized apart, are the tokens of the assembled text."""
    from megatron_long.tokenizer.loading import load_tokenizer

    tokenizer = load_tokenizer(train_tokenizer(name, tmp_path))
    task = NeedleTask()
    cases = build_cases(STORY, tokenizer, task, [400, 700], [0.0, 0.4, 1.0], prompt=prompt)
    for case in cases:
        tokens = case.row().tokens
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        text = tokenizer.decode(tokens[len(bos) :])
        assert text.count(task.needle) == 2  # hidden, and as lead and answer
        assert text.endswith(f"is {task.answer}")
        assert tokenizer.decode(tokens[-case.num_answer_tokens :]).strip() == task.answer
        again = [*bos, *tokenizer.encode(text)]
        # The window may begin within a word; from its first whole sentence on nothing differs.
        assert tokens[-300:].tolist() == again[-300:]


def train_tokenizer(name: str, folder: Path) -> Path:
    """Train a small tokenizer of a real kind on the story."""
    corpus = folder / "corpus.txt"
    corpus.write_text(STORY.replace(". ", ".\n") + "\n" + NeedleTask().needle * 3)
    if name == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return folder / "tokenizer.model"
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    bpe.train([str(corpus)], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("ending", ["", "。"])
def test_every_depth_is_met_without_western_sentences(tokenizer, caplog, ending):
    """Words in one line that never end, and Chinese: ten depths are ten."""
    text = ending.join(f" w{number}" for number in range(3000))
    depths = np.linspace(0, 1, 10).tolist()
    cases = build_cases(text, tokenizer, NeedleTask(), [300, 1500], depths)
    assert all(abs(case.actual_depth - case.depth) < 0.05 for case in cases[10:])
    assert len({case.needle_start for case in cases[10:]}) == 10
    near = [abs(case.actual_depth - case.depth) * 200 <= 64 for case in cases[:10]]
    assert all(near)
    assert ("farther from their depth" in caplog.text) == (ending == "")


def test_a_sentence_near_the_depth_stays_whole(tokenizer):
    """Fine depths over sentences of forty words: the needle stays between them."""
    sentences = [" ".join(f"w{(first + n) % 40}" for n in range(40)) for first in range(40)]
    text = "Now " + ". Now ".join(sentences) + "."
    cases = build_cases(text, tokenizer, NeedleTask(), [400], np.linspace(0, 1, 30).tolist())
    before = [tokenizer.decode(case.row().tokens[: case.needle_start]) for case in cases]
    assert all(part.endswith((".", "<book>")) for part in before)
