"""Arithmetic on paper: the steps are the columns, from the right, each with its carry."""

import random

from train.tasks.problem import Problem


def add(rng: random.Random, difficulty: int) -> Problem:
    """A number of `difficulty` + 1 digits and one of up to as many, in either order."""
    a, b = rng.sample(_pair(rng, difficulty + 1), 2)
    steps, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    low, high = sorted((a, b))
    return _problem("add", difficulty, f"{a} + {b}", steps, a + b, f"{low} {high}")


def subtract(rng: random.Random, difficulty: int) -> Problem:
    """A number of `difficulty` + 1 digits less a smaller one."""
    b, a = sorted(_pair(rng, difficulty + 1))
    steps, borrow = [], 0
    for x, y in _columns(a, b):  # ten is always borrowed, and stays where it was not needed
        rest = 10 + x - y - borrow
        steps.append(f"{10 + x}-{y}-{borrow}={rest}")
        borrow = int(rest < 10)
    return _problem("subtract", difficulty, f"{a} - {b}", steps, a - b, f"{a} {b}")


def multiply(rng: random.Random, difficulty: int) -> Problem:
    """A number of `difficulty` + 1 digits times one digit."""
    a, b = _number(rng, difficulty + 1), rng.randint(2, 9)
    steps, carry = [], 0
    for x in _digits(a):
        column = x * b + carry
        steps.append(f"{x}*{b}={x * b} {x * b}+{carry}={column}")
        carry = column // 10
    return _problem("multiply", difficulty, f"{a} * {b}", steps, a * b, f"{a} {b}")


def total(rng: random.Random, difficulty: int) -> Problem:
    """2 * `difficulty` + 1 numbers of one digit; the steps are the running totals."""
    terms = [rng.randint(1, 9) for _ in range(2 * difficulty + 1)]
    steps, so_far = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{so_far}+{term}={so_far + term}")
        so_far += term
    key = " ".join(map(str, sorted(terms)))
    return _problem("total", difficulty, " + ".join(map(str, terms)), steps, so_far, key)


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _pair(rng: random.Random, digits: int) -> list[int]:
    """A number of so many digits, and one of two up to so many, every length as often."""
    return [_number(rng, digits), _number(rng, rng.randint(2, digits))]


def _digits(number: int) -> list[int]:
    """From the right."""
    return [int(digit) for digit in reversed(str(number))]


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of both numbers that stand above each other, from the right, 0 where one ends."""
    width = max(len(str(a)), len(str(b)))
    x, y = (_digits(int(n)) + [0] * (width - len(str(n))) for n in (a, b))
    return list(zip(x, y, strict=True))


def _problem(
    task: str, difficulty: int, expression: str, steps: list[str], answer: int, key: str
) -> Problem:
    return Problem(task, difficulty, f"What is {expression}?", " ".join(steps), str(answer), key)
