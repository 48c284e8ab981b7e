"""Symbols in order: sorting, counting, editing a string, stepping through the calendar."""

import random

from train.tasks.problem import Problem

LETTERS = "abcdefgh"

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
    """2 * `difficulty` + 2 digits; the steps insert one after the other."""
    digits = "".join(rng.choices("0123456789", k=2 * difficulty + 2))
    steps = ["".join(sorted(digits[: i + 1])) for i in range(len(digits))]
    answer = steps[-1]
    return Problem("sort", difficulty, f"Sort {digits}.", " ".join(steps), answer, answer)


def count(rng: random.Random, difficulty: int) -> Problem:
    """How often a digit stands among 4 * `difficulty` others; the steps count along."""
    digits = "".join(rng.choices("0123456789", k=4 * difficulty))
    wanted = rng.choice("0123456789")
    # About every third digit is the wanted one: otherwise 0 and 1 are nearly always right.
    digits = "".join(wanted if rng.random() < 0.3 else digit for digit in digits)
    steps = [f"{digit}:{digits[: i + 1].count(wanted)}" for i, digit in enumerate(digits)]
    question = f"How many {wanted} are in {digits}?"
    answer, key = str(digits.count(wanted)), f"{wanted} {digits}"
    return Problem("count", difficulty, question, " ".join(steps), answer, key)


def edit(rng: random.Random, difficulty: int) -> Problem:
    """`difficulty` edits of five letters; the steps are the string after each."""
    letters = rng.sample(LETTERS, 5)
    edits = [rng.choice(list(EDITS)) for _ in range(difficulty)]
    question = f"{', '.join(edits)}: {' '.join(letters)}"
    steps, now = [], letters
    for name in edits:
        now = EDITS[name](now)
        steps.append(" ".join(now))
    return Problem("edit", difficulty, question, ", ".join(steps), steps[-1], question)


def date(rng: random.Random, difficulty: int) -> Problem:
    """So many days after a date of a year that is no leap year: up to 20 * `difficulty` days."""
    names = list(MONTHS)
    month = rng.randrange(12)
    first, days = rng.randint(1, MONTHS[names[month]]), rng.randint(1, 20 * difficulty)
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
