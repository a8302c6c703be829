"""English for generated text: articles, plurals, numbers, lists, colour words."""

import re
from collections.abc import Sequence

# fmt: off
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

# A mark of an object in a thought, which becomes its box where the thought is written down.
POINTING = re.compile(r"<#(\d+)>")

# Adjective of a material to the noun that answers "What is it made of?"
_MATERIAL_NOUNS = {"wooden": "wood", "metallic": "metal"}


def number_word(count: int) -> str:
    """Number 2 is "two"; digits above twenty."""
    return _NUMBERS[count] if 0 <= count < len(_NUMBERS) else str(count)


def ordinal_word(rank: int) -> str:
    """Rank 1 (0-based) is "second"."""
    return _ORDINALS[rank]


def plural(noun: str) -> str:
    """The plural of a label: its last word is inflected ("office chairs", "bookshelves")."""
    if noun.endswith("shelf"):
        return noun[:-1] + "ves"
    if re.search(r"(s|x|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def counted(count: int, noun: str) -> str:
    """Such as "one bed", "three chairs"."""
    return f"{number_word(count)} {noun if count == 1 else plural(noun)}"


def with_article(phrase: str) -> str:
    """Such as "a chair", "an office chair"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def joined(parts: Sequence[str], last: str = "and") -> str:
    """Such as "x", "x and y", "x, y and z"."""
    parts = list(parts)
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def metres(value: float) -> str:
    """A length as words use it: one decimal."""
    return f"{value:.1f}"


def colour_fits(word: str, color: str) -> bool:
    """Whether an object of `color` may be called `word`: "brown" also fits "dark brown", not the other way round."""
    return color == word or color.endswith(" " + word)


def colours_overlap(first: str, second: str) -> bool:
    """Whether one of two colour words may stand for the other."""
    return colour_fits(first, second) or colour_fits(second, first)


def colour_answers(color: str) -> tuple[str, ...]:
    """Accepted answers for a colour: the exact words and the plain colour."""
    plain = color.split()[-1]
    return (color,) if plain == color else (color, plain)


def material_noun(material: str) -> str:
    """Material "wooden" is "wood"; most material adjectives are their own noun."""
    return _MATERIAL_NOUNS.get(material, material)


def pointing(words: str, *object_ids: int) -> str:
    """Words with the marks of the objects that they name, such as "the bed <#3>"; `POINTING` finds a mark."""
    return " ".join([words, *(f"<#{object_id}>" for object_id in object_ids)])


def numbered(noun: str, object_ids: Sequence[int]) -> str:
    """Things counted one by one, such as "chair <#3> 1 and chair <#7> 2": the last number is how many there are."""
    return joined([f"{pointing(noun, object_id)} {place}" for place, object_id in enumerate(object_ids, 1)])


def sentence(text: str) -> str:
    """First letter upper case."""
    return text[:1].upper() + text[1:]


def tokenize(text: str) -> list[str]:
    """Lower-case tokens, punctuation apart, as the `token` lists of ScanRefer and Nr3D hold them."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[.,;:?!]", text.lower())
