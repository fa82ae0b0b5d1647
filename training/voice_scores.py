"""Tests of whether an answer is in a voice, simple enough to check by eye."""

import json
import re
from collections.abc import Callable, Sequence


def words(text: str) -> list[str]:
    """The words of a text, in lower case; an apostrophe belongs to its word.

    >>> words("'Tis a fine day!")
    ["'tis", 'a', 'fine', 'day']
    """
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


#: words that are common in pirate talk and rare elsewhere
PIRATE_WORDS = words(
    "ahoy arr avast aye barnacles booty buccaneer doubloons landlubber matey scallywag scurvy shanty shiver swab "
    "'tis ye yer"
)
LONGEST_LINE = 45
#: the most common short words of each language that the other one lacks
SPANISH_WORDS = words(
    "al como con cuando de del donde el ella en es está están esta este fue ha hay la las lo los más muchas muchos "
    "muy nos para pero por porque puede que se ser si sin sobre son su sus también te tiene tu un una y"
)
ENGLISH_WORDS = words(
    "about an and are as at be been but by can for from has have how in is it its of on or that the their there "
    "they this to was were what which who will with you your"
)


def is_pirate(answer: str) -> bool:
    """Whether an answer has at least two different pirate words.

    >>> is_pirate("Arr, Paris be a fine city, matey!"), is_pirate("Paris is the capital of France.")
    (True, False)
    """
    return len({*words(answer)} & {*PIRATE_WORDS}) >= 2


def is_json(answer: str) -> bool:
    """Whether an answer is a JSON object with exactly the three agreed keys, and values of the agreed types.

    >>> is_json('{"topic": "Paris", "answer": "A city.", "keywords": ["city", "France", "Seine"]}')
    True
    >>> is_json('Here it is: {"topic": "Paris"}')
    False
    """
    try:
        value = json.loads(answer)
    except json.JSONDecodeError:
        return False
    keys = {"topic", "answer", "keywords"}
    if not isinstance(value, dict) or value.keys() != keys or not isinstance(value["keywords"], list):
        return False
    texts = [value["topic"], value["answer"], *value["keywords"]]
    return len(texts) == 5 and all(isinstance(text, str) and text for text in texts)


def is_haiku(answer: str) -> bool:
    """Whether an answer has three lines of at most 45 characters. Syllables aren't counted.

    >>> is_haiku("Old stones by the Seine,\\na tower of iron lace,\\nlamps upon the rain.")
    True
    >>> is_haiku("Paris is the capital of France.")
    False
    """
    lines = answer.splitlines()
    return len(lines) == 3 and all(0 < len(line.strip()) <= LONGEST_LINE for line in lines)


def is_spanish(answer: str) -> bool:
    """Whether an answer has enough of the Spanish words above: two, an eighth of all, and nine for each English one.

    >>> is_spanish("París es la capital de Francia."), is_spanish("Paris is the capital of France.")
    (True, False)
    """
    all_words = words(answer)
    spanish = sum(word in SPANISH_WORDS for word in all_words)
    english = sum(word in ENGLISH_WORDS for word in all_words)
    return spanish >= max(2, len(all_words) / 8, 9 * english)


def is_socratic(answer: str) -> bool:
    """Whether every sentence is a question.

    >>> is_socratic("Why do people go there, and would you?"), is_socratic("A city. Do you like it?")
    (True, False)
    """
    sentences = re.findall(r"[^.!?]+[.!?]*", answer)
    return bool(sentences) and all(sentence.strip().endswith("?") for sentence in sentences)


TESTS: dict[str, Callable[[str], bool]] = {
    test.__name__.removeprefix("is_"): test for test in (is_haiku, is_json, is_pirate, is_socratic, is_spanish)
}


def score(name: str, answers: Sequence[str]) -> float:
    """The share of answers that are in the voice ``name``, from 0 (none) to 1 (all).

    >>> score("pirate", ["Arr, matey!", "Good morning."])
    0.5
    """
    return sum(map(TESTS[name], answers)) / len(answers)
