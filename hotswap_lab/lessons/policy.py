"""Chapter 11: a policy that learns while it answers.

Tests: ``tests/lessons/test_exercises.py``.
"""

from ..pools.rows import Row
from .exercise import Exercise


@Exercise
def two_tricks(solution):
    """Return the advantage of each answer among those to its prompt by the same policy as it is now."""
    rewards = {"shout": lambda text: float(text.isupper()), "short": lambda text: -float(len(text))}
    now = {"shout": 5, "short": 4}
    loud, quiet, old = Row("shout", 5, 1.0), Row("short", 4, 1.0), Row("shout", 4, 1.0)
    for case, rows, prompts, texts, expected in (
        ("one policy, two prompts", [loud] * 4, ["a", "a", "b", "b"], ["A", "a", "b", "b"], [0.5, -0.5, 0, 0]),
        ("a reward for each policy", [quiet] * 2, ["ab", "ab"], ["AB", "a"], [-0.5, 0.5]),
        ("two policies, one prompt", [loud, quiet] * 2, ["a"] * 4, ["A", "A", "a", "aaa"], [0.5, 1, -0.5, -1]),
        ("an older version, and one alone", [loud, old, loud, loud], [*"aaab"], [*"AAaA"], [0.5, 0, -0.5, 0]),
        ("no answer that counts", [old, old], ["a"] * 2, ["A", "a"], [0, 0]),
    ):
        yield case, [*map(float, solution(rows, prompts, texts, rewards, now))], [*map(float, expected)]
