"""Generated problems: lengths, sides of the split, and right answers."""

from __future__ import annotations

from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, draw_core
from tests.data.tasks.gsm_infinite.made import TOKENIZER, problems


def test_lengths_are_between_the_bounds_and_fill_them() -> None:
    lengths = [len(TOKENIZER.encode(p.prompt)) for p in problems(150)]
    assert min(lengths) >= 300 and max(lengths) <= 400
    assert min(lengths) < 315 and max(lengths) > 385


def test_no_core_of_training_is_held_out() -> None:
    cores = [draw_core(Draws(0, side, n), 1, bool(side)) for side in (0, 1) for n in range(4000)]
    train, held_out = (
        {(core.wording.name, core.query, frozenset(core.graph.equations)) for core in part}
        for part in (cores[:4000], cores[4000:])
    )
    assert len(held_out) > 3000 and not train & held_out


def test_a_core_does_not_depend_on_the_order_of_its_equations() -> None:
    """A difference swaps its operands where it would be negative, so that the order of drawing does not show."""
    core = next(c for c in (draw_core(Draws(0, 0, n), 1, False) for n in range(99)) if len(c.graph.equations) == 3)
    before = core.content()
    core.graph.equations[:2] = core.graph.equations[1::-1]
    assert core.content() == before


def test_a_tokenizer_that_takes_more_for_sentences_alone_reaches_the_lengths() -> None:
    """Tokenizers of the Llama kind begin every text with a token of its own."""

    def count(text: str) -> int:
        return 1 + len(TOKENIZER.encode(text))

    lengths = [count(p.prompt) for p in problems(150, Lengths(300, 403, 3, count))]
    assert 300 <= min(lengths) < 315 and 385 < max(lengths) <= 400
