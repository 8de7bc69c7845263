from __future__ import annotations

from sleeptrain.prepare.split import side


def test_the_share_is_met_and_grows_in_order() -> None:
    texts = [f"document number {i}" for i in range(4000)]
    few = {text for text in texts if side(text, 0.05) == "validation"}
    assert 140 < len(few) < 260
    assert few < {text for text in texts if side(text, 0.2) == "validation"}


def test_copies_are_on_one_side() -> None:
    for i in range(200):
        text = f"word {i}\n  and more"
        copies = (text, text.replace("\n", "\r\n"), text + "\n", "\n" + text.replace(" ", "\t"))
        assert len({side(copy, 0.5) for copy in copies}) == 1


def test_other_words_are_another_text() -> None:
    assert len({side(f"a{'b' * i}", 0.5) for i in range(50)}) == 2
    assert any(side(f"a{i} b", 0.5) != side(f"a{i}b", 0.5) for i in range(50))


def test_sides_never_change() -> None:
    # Pinned: another hash would move documents between the sides of every corpus.
    assert "".join(side(f"text {i}", 0.5)[0] for i in range(16)) == "tttvttvvttvvvvvv"
