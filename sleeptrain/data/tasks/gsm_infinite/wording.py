"""Three wordings that turn a problem's arithmetic into text and back, each with its own names and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sleeptrain.data.tasks.gsm_infinite.graph import Equation, Kind, Quantity
from sleeptrain.errors import DataError

ANSWER = "Answer:"


@dataclass(frozen=True)
class Wording:
    """One wording. Its texts are format strings.

    items, places: the names for the two indices of a quantity; each is one word.
    quantity: the name of a quantity, with {item} and {place}.
    question: the question for the quantity {q}.
    templates: a sentence for each kind, with the quantity {q}, its operands {a} and {b}, and the number {n}.
    """

    name: str
    items: tuple[str, ...]
    places: tuple[str, ...]
    quantity: str
    question: str
    templates: dict[Kind, str]

    @cached_property
    def quantities(self) -> list[Quantity]:
        return [(item, place) for item in range(len(self.items)) for place in range(len(self.places))]

    def named(self, quantity: Quantity) -> str:
        return self.quantity.format(item=self.items[quantity[0]], place=self.places[quantity[1]])

    def ask(self, quantity: Quantity) -> str:
        return self.question.format(q=self.named(quantity))

    def say(self, equation: Equation) -> str:
        names = dict(zip("ab", map(self.named, equation.operands), strict=False))
        sentence = self.templates[equation.kind].format(q=self.named(equation.quantity), n=equation.number, **names)
        return sentence[0].upper() + sentence[1:]

    def read(self, sentence: str) -> Equation:
        """The equation of a sentence. Raises DataError if the sentence is not of this wording."""
        text = sentence[0].lower() + sentence[1:]
        for kind, pattern in self._patterns.items():
            if match := pattern.fullmatch(text):
                groups = match.groupdict()
                operands = tuple(self._quantity(groups, letter) for letter in "ab" if f"{letter}_item" in groups)
                return Equation(self._quantity(groups, "q"), kind, int(groups.get("n", 0)), operands)
        raise DataError(f"this is no sentence of the wording {self.name!r}: {sentence!r}")

    def read_question(self, question: str) -> Quantity:
        """The quantity that a question asks for. Raises DataError if the question is not of this wording."""
        if match := self._question_pattern.fullmatch(question):
            return self._quantity(match.groupdict(), "q")
        raise DataError(f"this is no question of the wording {self.name!r}: {question!r}")

    def texts(self) -> Iterator[str]:
        """Texts that together contain every word of the wording."""
        yield from (*self.items, *self.places, self.ask((0, 0)))
        for kind in self.templates:
            yield self.say(self.example(kind))

    def example(self, kind: Kind, quantity: Quantity = (0, 0)) -> Equation:
        """An equation of this kind with only one quantity in it."""
        operands = {Kind.NUMBER: 0, Kind.SUM: 2, Kind.DIFFERENCE: 2}.get(kind, 1)
        return Equation(quantity, kind, 0 if operands == 2 else 1, (quantity,) * operands)

    def _quantity(self, groups: dict[str, str], letter: str) -> Quantity:
        return self.items.index(groups[f"{letter}_item"]), self.places.index(groups[f"{letter}_place"])

    def _pattern(self, template: str) -> re.Pattern[str]:
        item, place = "|".join(self.items), "|".join(self.places)
        groups = {
            letter: re.escape(self.quantity)
            .replace(r"\{item\}", f"(?P<{letter}_item>{item})")
            .replace(r"\{place\}", f"(?P<{letter}_place>{place})")
            for letter in "qab"
        }
        pattern = re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)")
        for letter, group in groups.items():
            pattern = pattern.replace(rf"\{{{letter}\}}", group)
        return re.compile(pattern)

    @cached_property
    def _patterns(self) -> dict[Kind, re.Pattern[str]]:
        return {kind: self._pattern(template) for kind, template in self.templates.items()}

    @cached_property
    def _question_pattern(self) -> re.Pattern[str]:
        return self._pattern(self.question)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FARM = Wording(
    "farm",
    _words(
        "hens geese ducks goats sheep cows horses donkeys pigs rabbits llamas turkeys doves bees cats dogs mules lambs "
        "calves foals quails swans ponies oxen"
    ),
    _words(
        "Ashby Birchwood Coldbrook Dunmore Eastfield Ferndale Glenrock Hillcrest Ivybridge Juniper Kingsley Larkspur "
        "Millbank Northgate Oakham Pinehurst Quarry Riverside Stonehill Thornton Upland Vineyard Westmoor Yarrow"
    ),
    "the number of {item} at {place}",
    "What is {q}?",
    {
        Kind.NUMBER: "{q} is {n}.",
        Kind.SUM: "{q} is the sum of {a} and {b}.",
        Kind.DIFFERENCE: "{q} is {a} minus {b}.",
        Kind.MORE: "{q} is {n} more than {a}.",
        Kind.FEWER: "{q} is {n} fewer than {a}.",
        Kind.TIMES: "{q} is {n} times {a}.",
    },
)
LIBRARY = Wording(
    "library",
    _words(
        "novels atlases poems maps letters diaries comics plays essays sketches scores journals fables myths hymns "
        "almanacs manuals biographies ballads sagas sonnets riddles chronicles legends"
    ),
    _words(
        "Aldgate Belmont Carlisle Denton Elmwood Farringdon Granville Holborn Islington Jericho Kenwood Lambeth "
        "Marlow Newport Orchard Paddock Quayside Redcliff Somerset Tavistock Underhill Victoria Windsor Yardley"
    ),
    "the count of {item} kept in {place}",
    "How large is {q}?",
    {
        Kind.NUMBER: "{q} equals {n}.",
        Kind.SUM: "{q} equals {a} plus {b}.",
        Kind.DIFFERENCE: "{q} equals the difference of {a} and {b}.",
        Kind.MORE: "{q} exceeds {a} by {n}.",
        Kind.FEWER: "{q} falls short of {a} by {n}.",
        Kind.TIMES: "{q} equals {a} multiplied by {n}.",
    },
)
HARBOUR = Wording(
    "harbour",
    _words(
        "barrels crates anchors ropes lanterns sails oars nets buoys chests bales sacks casks planks hooks flags bells "
        "compasses pulleys ladders hammocks rudders masts kegs"
    ),
    _words(
        "Amber Basalt Cobalt Dover Ember Flint Granite Hazel Indigo Jasper Kelp Lagoon Marble Nimbus Onyx Pearl Quartz "
        "Ruby Sable Topaz Umber Velvet Willow Zenith"
    ),
    "the stock of {item} on dock {place}",
    "Tell {q}.",
    {
        Kind.NUMBER: "{q} comes to {n}.",
        Kind.SUM: "{q} comes to {a} together with {b}.",
        Kind.DIFFERENCE: "{q} comes to {a} less {b}.",
        Kind.MORE: "{q} comes to {a} and {n} besides.",
        Kind.FEWER: "{q} comes to {a} without {n} of them.",
        Kind.TIMES: "{q} comes to {n} for each one in {a}.",
    },
)
WORDINGS = (FARM, LIBRARY, HARBOUR)
