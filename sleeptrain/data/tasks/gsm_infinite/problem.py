"""Generates problems: a graph with a number of operations, distractors up to a length in tokens, the text, a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.graph import Graph, Kind, Quantity, num_operations
from sleeptrain.data.tasks.gsm_infinite.solver import solve
from sleeptrain.data.tasks.gsm_infinite.wording import ANSWER, WORDINGS, Wording
from sleeptrain.data.tasks.split import ATTEMPTS, is_held_out
from sleeptrain.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """question, context: texts. answer: an integer, at least 0. ops: operations of the answer. wording: its name."""

    question: str
    context: str
    answer: int
    ops: int
    wording: str

    @property
    def prompt(self) -> str:
        """The question, then the context, so that the model knows the question while it memorises the context."""
        return f"{self.question} {self.context} {ANSWER}"


@dataclass(frozen=True)
class Lengths:
    """Bounds of the length of prompts, in tokens.

    least: of a prompt, at least. most: of a prompt and its answer, at most. answer: tokens reserved for the answer.
    count: returns the number of tokens of a text.
    """

    least: int
    most: int
    answer: int
    count: Callable[[str], int]

    @property
    def most_of_prompt(self) -> int:
        return self.most - self.answer

    def check(self, max_ops: int) -> None:
        """Raises ConfigError if a problem of `max_ops` operations may be too long, the names give too few sentences, or
        `least` and `most` are so close that possibly no sentence fits."""
        longest = max(self._most_tokens(kind) for kind in Kind)
        core = max(self.count(f"{w.ask((0, 0))} {ANSWER}") for w in WORDINGS) + 2 + self.answer
        core += max_ops * longest + (max_ops + 1) * self._most_tokens(Kind.NUMBER)
        shortest = min(self.count(" " + w.say(w.example(Kind.NUMBER))) for w in WORDINGS)
        supply = shortest * (min(len(w.quantities) for w in WORDINGS) - 1)
        with_one_more = self.least + longest + self.answer
        if self.most < max(core, with_one_more):
            raise ConfigError(
                f"data.gsm_infinite.max_tokens={self.most} must be at least {max(core, with_one_more)}: "
                f"data.gsm_infinite.max_ops={max_ops} operations may take {core} tokens, and "
                f"data.gsm_infinite.min_tokens={self.least} with one more sentence and the answer {with_one_more}"
            )
        if self.most_of_prompt > supply:
            raise ConfigError(
                f"data.gsm_infinite.max_tokens={self.most} must be at most {supply + self.answer}: there are no "
                "names for more sentences"
            )

    def _most_tokens(self, kind: Kind) -> int:
        """The most tokens that a sentence of this kind takes with any names."""
        most = 0
        for wording in WORDINGS:
            item = max(range(len(wording.items)), key=lambda i: self.count(" " + wording.items[i]))
            place = max(range(len(wording.places)), key=lambda i: self.count(" " + wording.places[i]))
            most = max(most, self.count(" " + wording.say(wording.example(kind, (item, place)))))
        return most


@dataclass(frozen=True)
class Core:
    """A problem without distractors. graph: its equations so far. query: the quantity that it asks for."""

    wording: Wording
    graph: Graph
    query: Quantity

    def content(self) -> bytes:
        """The identity of the core, independent of the order in which its equations were drawn."""
        return repr((self.wording.name, self.query, sorted(map(repr, self.graph.equations)))).encode()


def draw_core(draws: Draws, ops: int, held_out: bool) -> Core:
    """A random core with `ops` operations. held_out: the side of the split; no training problem has a held-out core."""
    wording = draws.choice(WORDINGS)
    for _ in range(ATTEMPTS):
        graph = Graph(draws, wording.quantities)
        core = Core(wording, graph, graph.add_needed(ops))
        if is_held_out(core.content()) == held_out:
            return core
    raise AssertionError("a wording has thousands of cores on either side")


def make_problem(draws: Draws, core: Core, lengths: Lengths) -> Problem:
    """Add distractors until the prompt has a length drawn from `lengths`, or is shorter by less than one sentence.

    Raises AssertionError if the solver finds another answer in the text.
    """
    wording, graph, count = core.wording, core.graph, lengths.count
    question = wording.ask(core.query)
    sentences = [wording.say(equation) for equation in graph.equations]

    def prompt_tokens() -> int:
        return count(Problem(question, " ".join(sentences), 0, 0, wording.name).prompt)

    target = draws.between(lengths.least, lengths.most_of_prompt)
    tokens = prompt_tokens()
    while tokens < target:
        graph.add_distractor()
        sentence = wording.say(graph.equations[-1])
        more = count(" " + sentence)
        if tokens + more > target and (tokens := prompt_tokens()) + more > target and tokens >= lengths.least:
            break
        sentences.append(sentence)
        tokens += more
        if tokens >= target:  # the prompt may have fewer tokens than its sentences together
            tokens = prompt_tokens()
    answer, ops = graph.values[core.query], num_operations(graph.equations, core.query)
    while True:
        problem = Problem(question, " ".join(draws.shuffled(sentences)), answer, ops, wording.name)
        if count(problem.prompt) <= lengths.most_of_prompt:
            break
        sentences.pop()  # the prompt may also have more tokens than its sentences together
    if solve(wording, problem.question, problem.context) != (answer, ops):
        raise AssertionError(f"the solver finds another answer: {problem}")
    return problem
