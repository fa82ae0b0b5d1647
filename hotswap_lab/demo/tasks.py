"""The tasks of the embedded model and its adapters: one word in, one word out.

A sample is the text ``word + ">" + answer``. The base model copies (``hello>hello``), and each demo adapter teaches it
a different task. Each task is a plain Python function, so every output of the model can be checked.

Tests: ``tests/demo/test_demo.py``.
"""

import random
import string
import zlib
from collections.abc import Callable

SEPARATOR = ">"
MAX_WORD_LENGTH = 10
VOWELS = "aeiou"


def copy(word: str) -> str:
    """hello -> hello"""
    return word


def reverse(word: str) -> str:
    """hello -> olleh"""
    return word[::-1]


def pig_latin(word: str) -> str:
    """hello -> ellohay, apple -> appleay: the first letter goes to the end unless it is a vowel"""
    return word + "ay" if word[0] in VOWELS else word[1:] + word[0] + "ay"


def caesar(word: str) -> str:
    """hello -> khoor: every letter moves three places on in the alphabet"""
    return "".join(chr((ord(letter) - ord("a") + 3) % 26 + ord("a")) for letter in word)


def sort(word: str) -> str:
    """hello -> ehllo"""
    return "".join(sorted(word))


def shout(word: str) -> str:
    """hello -> HELLO!"""
    return word.upper() + "!"


def double(word: str) -> str:
    """hello -> hellohello"""
    return word + word


def no_vowels(word: str) -> str:
    """hello -> h*ll*"""
    return "".join("*" if letter in VOWELS else letter for letter in word)


def vowels_up(word: str) -> str:
    """hello -> hEllO"""
    return "".join(letter.upper() if letter in VOWELS else letter for letter in word)


TASKS: dict[str, Callable[[str], str]] = {
    task.__name__: task for task in (copy, reverse, pig_latin, caesar, sort, shout, double, no_vowels, vowels_up)
}


def is_held_out(word: str) -> bool:
    """Whether a word belongs to the eighth of all words that isn't used in training."""
    return zlib.crc32(word.encode()) % 8 == 0


def sample_words(count: int, seed: int, *, held_out: bool, alphabet: str = string.ascii_lowercase) -> list[str]:
    """Draw ``count`` words of 1 to 10 letters, all held out or none of them. The same seed gives the same words."""
    rng = random.Random(seed)
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choices(alphabet, k=rng.randint(1, MAX_WORD_LENGTH)))
        if is_held_out(word) == held_out:
            words.append(word)
    return words
