from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import sympy
import torch

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.batch import IGNORE, PAD
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.pool import Generated
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, Problem, draw_core, make_problem
from sleeptrain.data.tasks.gsm_infinite.solver import solve
from sleeptrain.data.tasks.gsm_infinite.task import GsmInfinite
from sleeptrain.data.tasks.gsm_infinite.wording import FARM, HARBOUR, LIBRARY, WORDINGS
from sleeptrain.data.tasks.gsm_infinite.words import WordTokenizer
from sleeptrain.data.tasks.task import Answered
from sleeptrain.data.tokenizer import train_tokenizer
from sleeptrain.errors import ConfigError, DataError

TOKENIZER = WordTokenizer()
LENGTHS = Lengths(300, 403, 3, lambda text: len(TOKENIZER.encode(text)))
# What each turn says, read with no help from the package: the named quantities are x0 (what it is about), x1, x2.
NAME = r"(?:number|count|stock) of \w+ (?:at|kept in|on dock) \w+"
SYMBOLIC = {
    r"x0 is (\d+)|x0 equals (\d+)|x0 comes to (\d+)": "x0 - n",
    r"x0 is the sum of x1 and x2|x0 equals x1 plus x2|x0 comes to x1 together with x2": "x0 - x1 - x2",
    r"x0 is x1 minus x2|x0 equals the difference of x1 and x2|x0 comes to x1 less x2": "x0 - x1 + x2",
    r"x0 is (\d+) more than x1|x0 exceeds x1 by (\d+)|x0 comes to x1 and (\d+) besides": "x0 - x1 - n",
    r"x0 is (\d+) fewer than x1|x0 falls short of x1 by (\d+)|x0 comes to x1 without (\d+) of them": "x0 - x1 + n",
    r"x0 is (\d+) times x1|x0 equals x1 multiplied by (\d+)|x0 comes to (\d+) for each one in x1": "x0 - n*x1",
}


def problems(count: int, lengths: Lengths = LENGTHS, held_out: bool = False) -> list[Problem]:
    found = []
    for number in range(count):
        draws = Draws(0, 0, number)
        found.append(make_problem(draws, draw_core(draws, 1 + number % 8, held_out), lengths))
    return found


def equations(problem: Problem) -> dict[str, tuple[str, list[str]]]:
    """(the equation, that is 0, over names; the names it needs) of each quantity."""
    found = {}
    for sentence in problem.context.rstrip(".").split(". "):
        names = re.findall(NAME, sentence)
        short = re.sub("(?:[Tt]he )" + NAME, "x?", sentence)
        for place in range(len(names)):
            short = short.replace("x?", f"x{place}", 1)
        [(turn, zero)] = [(t, z) for t, z in SYMBOLIC.items() if re.fullmatch(t, short)]
        number = next((g for g in re.fullmatch(turn, short).groups() if g), "0")  # type: ignore[union-attr]
        assert names[0] not in found
        found[names[0]] = (zero.replace("n", number), names)
    return found


def test_answers_are_those_of_symbolic_evaluation() -> None:
    """All sentences as one system of linear equations, solved by sympy; and the needed ones counted."""
    for problem in problems(24):
        given = equations(problem)
        symbols = {name: sympy.Symbol(f"q{index}") for index, name in enumerate(given)}
        system = [
            sympy.sympify(zero, locals={f"x{i}": symbols[name] for i, name in enumerate(names)})
            for zero, names in given.values()
        ]
        [asked] = re.findall(NAME, problem.question)
        [solution] = sympy.linsolve(system, *symbols.values())
        assert solution[list(symbols).index(asked)] == problem.answer
        needed, waiting = set[str](), [asked]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += given[name][1][1:]
        assert sum(len(given[name][1]) > 1 for name in needed) == problem.ops
        assert all(0 <= value <= 999 for value in solution)
        assert len(needed) < len(given), "there are distractors"


def test_all_turns_of_all_wordings_are_used() -> None:
    said = Counter()
    for problem in problems(60):
        [wording] = [w for w in WORDINGS if w.name == problem.wording]
        for sentence in re.findall(r"[^.]+\.", problem.context):
            said[problem.wording, wording.read(sentence.strip()).kind] += 1
    assert len(said) == 18 and min(said.values()) > 20


def test_lengths_are_between_the_bounds_and_fill_them() -> None:
    lengths = [len(TOKENIZER.encode(p.prompt)) for p in problems(150)]
    assert min(lengths) >= 300 and max(lengths) <= 400
    assert min(lengths) < 315 and max(lengths) > 385


def test_the_solver_refuses_what_it_cannot_solve() -> None:
    def refusal(question: str, context: str) -> str:
        with pytest.raises(DataError) as error:
            solve(FARM, question, context)
        return str(error.value)

    question, one = (
        "What is the number of hens at Ashby?",
        "The number of hens at Ashby is 2 more than the number of cows at Oakham.",
    )
    cows = "The number of cows at Oakham is 3."
    assert solve(FARM, question, f"{cows} {one}") == (5, 1)
    assert "needed and never said" in refusal(question, one)
    assert "said twice" in refusal(question, f"{one} {cows} {cows}")
    around = "The number of cows at Oakham is 2 times the number of hens at Ashby."
    assert "needed to find itself" in refusal(question, f"{one} {around}")
    assert "no sentence" in refusal(question, "Cows are many.")
    assert "no question" in refusal("How many hens?", one)


@pytest.mark.parametrize("wording", [FARM, LIBRARY, HARBOUR])
def test_every_sentence_reads_back(wording) -> None:
    assert len(set(wording.items)) == len(set(wording.places)) == 24
    for kind in wording.templates:
        equation = wording.example(kind, (3, 5))
        assert wording.read(wording.say(equation)) == equation
    assert wording.read_question(wording.ask((23, 23))) == (23, 23)


def test_no_core_of_training_is_held_out() -> None:
    kept = [draw_core(Draws(0, side, n), 1, bool(side)) for side in (0, 1) for n in range(4000)]
    train, held_out = (
        {(core.wording.name, core.query, frozenset(core.graph.equations)) for core in part}
        for part in (kept[:4000], kept[4000:])
    )
    assert len(held_out) > 3000 and not train & held_out


def test_a_core_is_the_same_in_whichever_order_it_was_thought_of() -> None:
    """A difference turns its operands where it would be negative, so that either may have been drawn first."""
    core = next(c for c in (draw_core(Draws(0, 0, n), 1, False) for n in range(99)) if len(c.graph.equations) == 3)
    before = core.content()
    core.graph.equations[:2] = core.graph.equations[1::-1]
    assert core.content() == before


def test_words_are_a_vocabulary_of_their_own() -> None:
    text = problems(1)[0].prompt
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and min(ids) > 0 and max(ids) < TOKENIZER.vocab_size < 256
    assert TOKENIZER.encode(" 907") == [*TOKENIZER.encode("9"), *TOKENIZER.encode("0"), *TOKENIZER.encode("7")]
    assert TOKENIZER.eos_id not in ids
    with pytest.raises(DataError, match=r"'lions'.*data\.gsm_infinite\.tokenizer"):
        TOKENIZER.encode("the number of lions")


def config(**changes: object) -> GsmInfiniteConfig:
    return GsmInfiniteConfig(**({"max_ops": 3, "min_tokens": 150, "max_tokens": 220} | changes))  # type: ignore[arg-type]


def test_a_row_asks_first_and_answers_last() -> None:
    task = GsmInfinite(config())
    batch = task.rows(0, 0, 30)
    for row in range(30):
        tokens, targets = batch.tokens_BT[row], batch.targets_BT[row]
        prompt, _, said = task.text(tokens.tolist()).partition(" Answer:")
        [wording] = [w for w in WORDINGS if prompt.startswith(w.question.split("{q}")[0])]
        question, context = re.fullmatch(r"(.+?[?.]) (.*)", prompt).groups()  # type: ignore[union-attr]
        answer, ops = solve(wording, question, context)
        wanted = targets[targets != IGNORE].tolist()
        assert task.text(wanted) == str(answer) and wanted[-1] == TOKENIZER.eos_id and 1 <= ops <= 3
        assert said.strip() == str(answer), "the answer's tokens are inputs too, all but its end"
        length = int((batch.documents_BT[row] != PAD).sum())
        assert (targets != IGNORE).nonzero().flatten().tolist() == list(range(length - len(wanted), length))
        assert 150 <= length <= 220 and (batch.documents_BT[row, length:] == PAD).all()


def test_a_problem_without_operations_asks_for_a_number_that_is_said() -> None:
    task = GsmInfinite(config(min_ops=0, max_ops=1))
    asked = Counter(task._pool.held_out(number).ops for number in range(400))
    assert set(asked) == {0, 1} and min(asked.values()) > 150
    problem = next(p for p in map(task._pool.held_out, range(400)) if p.ops == 0)
    quantity = re.search("(the (?:number|count|stock) .+?)[?.]$", problem.question).group(1)  # type: ignore[union-attr]
    said = [s for s in problem.context.split(". ") if s.lower().startswith(quantity.lower())]
    assert len(said) == 1 and re.fullmatch(r".* (\d)\.?", said[0]).group(1) == str(problem.answer)  # type: ignore[union-attr]


def test_operations_are_uniform() -> None:
    task = GsmInfinite(config(max_ops=8, min_tokens=300, max_tokens=340))
    batch = task.held_out(0, 400)
    ops = []
    for row in range(400):
        prompt = task.text(batch.tokens_BT[row].tolist()).partition(" Answer:")[0]
        [wording] = [w for w in WORDINGS if prompt.startswith(w.question.split("{q}")[0])]
        ops.append(solve(wording, *re.fullmatch(r"(.+?[?.]) (.*)", prompt).groups())[1])  # type: ignore[union-attr]
    found = Counter(ops)
    assert set(found) == set(range(1, 9)) and min(found.values()) > 28
    right_BT = Answered(batch, batch.targets_BT.clone(), torch.zeros(batch.targets_BT.shape))
    by_ops = task.metrics([right_BT])["accuracy_by_ops"]
    assert by_ops == {f"ops={n}": 1.0 for n in range(1, 9)}, "a row's operations are known by its number"
    spoiled = Answered(batch, torch.where(torch.tensor(ops)[:, None] == 3, -1, batch.targets_BT), right_BT.loss_BT)
    assert {k for k, v in task.metrics([spoiled])["accuracy_by_ops"].items() if v == 0.0} == {"ops=3"}


def test_operations_are_drawn_as_often_each() -> None:
    pool = Generated(config(max_ops=8), LENGTHS)
    drawn = Counter(pool.held_out_ops(number) for number in range(8000))
    assert set(drawn) == set(range(1, 9)) and max(abs(count - 1000) for count in drawn.values()) < 110


def test_metrics_against_a_count_by_hand() -> None:
    """A row counts when all its tokens are right: three of eight are spoiled, one in its last token only."""
    task = GsmInfinite(config())
    batch = task.held_out(0, 8)
    predicted_BT = batch.targets_BT.clone()
    for row, place in ((0, 0), (3, -1), (5, 0)):
        at = int((batch.targets_BT[row] != IGNORE).nonzero()[place])
        predicted_BT[row, at] += 1
    parts = [Answered(batch.rows(a, b), predicted_BT[a:b], torch.zeros(b - a, 220)) for a, b in ((0, 5), (5, 8))]
    assert task.metrics(parts)["accuracy"] == 5 / 8


def test_paper_lengths_can_be_reached() -> None:
    batch = GsmInfinite(GsmInfiniteConfig()).rows(0, 0, 40)
    lengths = (batch.documents_BT != PAD).sum(1).tolist()
    assert batch.tokens_BT.shape == (40, 3300) and min(lengths) >= 2000 and max(lengths) <= 3300
    assert min(lengths) < 2200 and max(lengths) > 3100


def test_lengths_are_in_the_tokens_of_the_models_own_tokenizer(tmp_path: Path) -> None:
    texts = [p.prompt for p in problems(60)]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer.model")
    task = GsmInfinite(config(tokenizer=str(tmp_path), min_tokens=250, max_tokens=400))
    batch = task.rows(0, 0, 20)
    assert task.vocab_size == 400
    for row in range(20):
        inputs = batch.tokens_BT[row][batch.documents_BT[row] != PAD].tolist()
        wanted = batch.targets_BT[row][batch.targets_BT[row] != IGNORE].tolist()
        assert 240 <= len(inputs) <= 400 and wanted[-1] == tokenizer.eos_id
        assert re.fullmatch(r" \d{1,3}", tokenizer.decode(wanted))
        prompt = inputs[: len(inputs) - len(wanted) + 1]
        assert tokenizer.decode(prompt).endswith(" Answer:") and tokenizer.encode(tokenizer.decode(prompt)) == prompt


def test_there_is_room_for_the_longest_answer_of_a_tokenizer_that_merges_some(tmp_path: Path) -> None:
    texts = [*(p.prompt for p in problems(20)), *["Answer: 100 and Answer: 999."] * 99]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer.model")
    room = [len(tokenizer.encode(f" {answer}")) for answer in range(1000)]
    assert max(room[100], room[999]) < max(room), "the case is not the one to test"
    task = GsmInfinite(config(tokenizer=str(tmp_path), min_tokens=250, max_tokens=400))
    assert task._pool._lengths.answer == max(room)  # type: ignore[union-attr]


def test_a_tokenizer_that_takes_more_for_sentences_alone_reaches_the_lengths() -> None:
    """Tokenizers of the Llama kind begin every text with a token of its own."""

    def count(text: str) -> int:
        return 1 + len(TOKENIZER.encode(text))

    lengths = [count(p.prompt) for p in problems(150, Lengths(300, 403, 3, count))]
    assert 300 <= min(lengths) < 315 and 385 < max(lengths) <= 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_ops": 8}, ["max_tokens=220", "max_ops=8", "at least"]),
        ({"min_tokens": 210}, ["max_tokens=220", "min_tokens=210", "at least"]),
        ({"max_tokens": 9000}, ["max_tokens=9000", "at most", "names"]),
    ],
)
def test_impossible_lengths_are_refused(changes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        GsmInfinite(config(**changes))
    assert all(word in str(error.value) for word in words), error.value
    [way_out] = re.findall(r"must be at (?:least|most) (\d+)", str(error.value))
    GsmInfinite(config(**changes | {"max_tokens": int(way_out)})).rows(0, 0, 20)
