"""Symbols in order: sorting, counting, editing a string, stepping through the calendar."""

import random

from train.tasks.problem import Problem

LETTERS = "abcdefgh"
EARLY, LATE = "abcdefghiklm", "nopqrstuvwxy"
"""Before n, and from n on."""

MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}

EDITS = {
    "reverse": lambda s: s[::-1],
    "rotate": lambda s: s[1:] + s[:1],
    "swap": lambda s: s[-1:] + s[1:-1] + s[:1],
    "drop": lambda s: s[1:],
}
"""Turn round; the first to the end; exchange first and last; remove the first."""


def sort(rng: random.Random, difficulty: int) -> Problem:
    """2 * `difficulty` + 2 digits; the steps are the two halves, sorted."""
    digits = "".join(rng.choices("0123456789", k=2 * difficulty + 2))
    half = difficulty + 1
    steps = ["".join(sorted(part)) for part in (digits[:half], digits[half:])]
    answer = "".join(sorted(digits))
    return Problem("sort", difficulty, f"Sort {digits}.", " ".join(steps), answer, answer)


def count(rng: random.Random, difficulty: int) -> Problem:
    """How many of 4 * `difficulty` letters come before n; the steps count along."""
    size = 4 * difficulty
    # Every number of them as often: otherwise the middle ones are too good a guess.
    early = rng.randint(max(0, size - len(LATE)), min(size, len(EARLY)))
    letters = rng.sample(EARLY, early) + rng.sample(LATE, size - early)
    rng.shuffle(letters)
    so_far = [sum(letter in EARLY for letter in letters[: i + 1]) for i in range(size)]
    steps = " ".join(f"{letter}{count}" for letter, count in zip(letters, so_far, strict=True))
    question, key = f"How many of {' '.join(letters)} come before n?", "".join(sorted(letters))
    return Problem("count", difficulty, question, steps, str(early), key)


def edit(rng: random.Random, difficulty: int) -> Problem:
    """`difficulty` edits of five letters; the steps are each edit and what it makes."""
    letters = rng.sample(LETTERS, 5)
    edits = [rng.choice(list(EDITS)) for _ in range(difficulty)]
    question = f"{', '.join(edits)}: {' '.join(letters)}"
    steps, now = [], letters
    for name in edits:
        now = EDITS[name](now)
        steps.append(f"{name} {' '.join(now)}")
    return Problem("edit", difficulty, question, ", ".join(steps), " ".join(now), question)


def date(rng: random.Random, difficulty: int) -> Problem:
    """A date of a year that is no leap year, and days later: about 20 * `difficulty` of them."""
    names = list(MONTHS)
    month = rng.randrange(12)
    first, days = rng.randint(1, MONTHS[names[month]]), 20 * difficulty - rng.randrange(19)
    question = f"What is {days} days after {names[month]} {first}?"
    key = f"{days} {month} {first}"
    day = first + days
    steps = [f"{first}+{days}={day}"]
    while day > MONTHS[names[month]]:
        length = MONTHS[names[month]]
        steps.append(f"{names[month]} {day}-{length}={day - length}")
        day, month = day - length, (month + 1) % 12
    answer = f"{names[month]} {day}"
    return Problem("date", difficulty, question, " ".join(steps), answer, key)
