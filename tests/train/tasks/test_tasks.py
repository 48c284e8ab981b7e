"""Problems are right by solvers that read the question only, and no held-out one is ever learnt."""

import calendar
import collections
import datetime
import itertools
import random
import re
from collections.abc import Callable, Iterable
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import tasks
from train.tasks import files
from train.tasks.problem import Problem

KINDS = list(itertools.product(tasks.TASKS, tasks.DIFFICULTIES))
YEAR = 2021  # no leap year, nor is the next
MONTHS = list(calendar.month_name)[1:]

each_kind = pytest.mark.parametrize(("task", "difficulty"), KINDS)


# --- answers


def numbers_of(question: str) -> tuple[list[int], str]:
    """The numbers and the one operator of `What is 3 + 4 + 5?`."""
    found = re.fullmatch(r"What is (\d+(?: [-+*] \d+)+)\?", question)
    assert found
    words = found[1].split(" ")
    (operator,) = set(words[1::2])
    assert all(word == str(int(word)) for word in words[::2])
    return [int(word) for word in words[::2]], operator


def solve_arithmetic(question: str) -> str:
    numbers, operator = numbers_of(question)
    while len(numbers) > 1:
        a, b = numbers[:2]
        numbers[:2] = [{"+": a + b, "-": a - b, "*": sum([a] * b)}[operator]]
    return str(numbers[0])


def solve_sort(question: str) -> str:
    found = re.fullmatch(r"Sort (\d+)\.", question)
    assert found
    return "".join(digit * found[1].count(digit) for digit in "0123456789")


def letters_of(question: str) -> list[str]:
    found = re.fullmatch(r"How many of ([a-z](?: [a-z])*) come before n\?", question)
    assert found
    return found[1].split(" ")


def solve_count(question: str) -> str:
    return str(sum(letter < "n" for letter in letters_of(question)))


def apply_edit(name: str, letters: list[str]) -> list[str]:
    queue = collections.deque(letters)
    match name:
        case "reverse":
            queue.reverse()
        case "rotate":
            queue.rotate(-1)
        case "swap":
            queue[0], queue[-1] = queue[-1], queue[0]
        case "drop":
            queue.popleft()
        case _:
            pytest.fail(f"no such edit: {name}")
    return list(queue)


def solve_edit(question: str) -> str:
    names, _, letters = question.partition(": ")
    now = letters.split(" ")
    for name in names.split(", "):
        now = apply_edit(name, now)
    return " ".join(now)


def date_of(question: str) -> tuple[int, datetime.date]:
    found = re.fullmatch(r"What is (\d+) days after (\w+) (\d+)\?", question)
    assert found
    return int(found[1]), datetime.date(YEAR, MONTHS.index(found[2]) + 1, int(found[3]))


def solve_date(question: str) -> str:
    days, start = date_of(question)
    end = start + datetime.timedelta(days)
    return f"{MONTHS[end.month - 1]} {end.day}"


SOLVERS: dict[str, Callable[[str], str]] = {
    "add": solve_arithmetic,
    "subtract": solve_arithmetic,
    "multiply": solve_arithmetic,
    "total": solve_arithmetic,
    "sort": solve_sort,
    "count": solve_count,
    "edit": solve_edit,
    "date": solve_date,
}

EQUATION = re.compile(r"(\d+)((?:[-+*]\d+)+)=(\d+)")


def check_equations(text: str) -> None:
    """Whatever looks like an equation holds; signs are applied from the left."""
    for first, rest, result in EQUATION.findall(text):
        value = int(first)
        for sign, number in re.findall(r"([-+*])(\d+)", rest):
            n = int(number)
            value = {"+": value + n, "-": value - n, "*": value * n}[sign]
        assert value == int(result), text
    assert text.count("=") == len(EQUATION.findall(text))


# --- steps


def columns(steps: str, signs: str) -> list[tuple[int, int, int, int]]:
    """`x?y?carry=result` of every column, from the right."""
    pattern = re.compile(rf"(\d+)\{signs[0]}(\d+)\{signs[1]}(\d)=(\d+)")
    found = [pattern.fullmatch(word) for word in steps.split(" ")]
    return [tuple(map(int, match.groups())) for match in found if match]  # type: ignore[misc]


def number(digits: Iterable[int]) -> int:
    """From the right."""
    return sum(digit * 10**place for place, digit in enumerate(digits))


def check_add(problem: Problem) -> None:
    (a, b), _ = numbers_of(problem.question)
    found = columns(problem.steps, "++")
    assert len(found) == len(problem.steps.split(" ")) == max(len(str(a)), len(str(b)))
    assert number(x for x, _, _, _ in found) == a
    assert number(y for _, y, _, _ in found) == b
    assert all(0 <= x <= 9 and 0 <= y <= 9 for x, y, _, _ in found)
    check_carries(found, problem)


def check_multiply(problem: Problem) -> None:
    (a, b), _ = numbers_of(problem.question)
    words = problem.steps.split(" ")
    products = [re.fullmatch(r"(\d)\*(\d)=(\d+)", word) for word in words[::2]]
    sums = [re.fullmatch(r"(\d+)\+(\d)=(\d+)", word) for word in words[1::2]]
    assert len(products) == len(sums) == len(str(a))
    found = []
    for product, carried in zip(products, sums, strict=True):
        assert product
        assert carried
        assert (int(product[2]), product[3]) == (b, carried[1])
        found.append((int(product[1]), b, int(carried[2]), int(carried[3])))
    assert number(x for x, _, _, _ in found) == a
    assert 2 <= b <= 9
    check_carries(found, problem)


def check_carries(found: list[tuple[int, int, int, int]], problem: Problem) -> None:
    assert [carry for _, _, carry, _ in found] == [0, *(total // 10 for *_, total in found[:-1])]
    last = found[-1][3]
    low = "".join(str(total % 10) for *_, total in reversed(found[:-1]))
    assert f"{last}{low}" == problem.answer


def check_subtract(problem: Problem) -> None:
    (a, b), _ = numbers_of(problem.question)
    assert a >= b
    found = columns(problem.steps, "--")
    assert len(found) == len(problem.steps.split(" ")) == len(str(a))
    # Ten is borrowed for every column, and one less in the next where it was needed.
    assert number(x - 10 for x, _, _, _ in found) == a
    assert number(y for _, y, _, _ in found) == b
    assert all(10 <= x <= 19 and 0 <= y <= 9 for x, y, _, _ in found)
    assert [less for _, _, less, _ in found] == [0, *(int(rest < 10) for *_, rest in found[:-1])]
    assert found[-1][3] >= 10
    assert number(rest % 10 for *_, rest in found) == int(problem.answer)


def check_total(problem: Problem) -> None:
    numbers, _ = numbers_of(problem.question)
    found = [re.fullmatch(r"(\d+)\+(\d+)=(\d+)", word) for word in problem.steps.split(" ")]
    parts = [tuple(map(int, match.groups())) for match in found if match]
    assert len(parts) == len(found) == len(numbers) - 1
    assert [term for _, term, _ in parts] == numbers[1:]
    assert [before for before, _, _ in parts] == [numbers[0], *(after for *_, after in parts[:-1])]
    assert str(parts[-1][2]) == problem.answer
    assert all(1 <= n <= 9 for n in numbers)


def check_sort(problem: Problem) -> None:
    digits = problem.question.removeprefix("Sort ").removesuffix(".")
    half = len(digits) // 2
    left, right = problem.steps.split(" ")
    for part, step in ((digits[:half], left), (digits[half:], right)):
        assert collections.Counter(step) == collections.Counter(part)
        assert all(a <= b for a, b in itertools.pairwise(step))


def check_count(problem: Problem) -> None:
    letters, seen = letters_of(problem.question), 0
    assert len(set(letters)) == len(letters)
    for letter, step in zip(letters, problem.steps.split(" "), strict=True):
        seen += letter < "n"
        assert step == f"{letter}{seen}"
    assert problem.answer == str(seen)


def check_edit(problem: Problem) -> None:
    names, _, letters = problem.question.partition(": ")
    now, steps = letters.split(" "), problem.steps.split(", ")
    assert len(now) == len(set(now)) == 5
    for name, step in zip(names.split(", "), steps, strict=True):
        now = apply_edit(name, now)
        assert step == f"{name} {' '.join(now)}"
    assert problem.answer == " ".join(now)


def check_date(problem: Problem) -> None:
    days, start = date_of(problem.question)
    first, *rest = re.findall(r"(?:^| )((?:[A-Z][a-z]+ )?\d+[-+]\d+=\d+)", problem.steps)
    assert " ".join([first, *rest]) == problem.steps
    assert first.startswith(f"{start.day}+{days}=")
    day, month = int(first.split("=")[1]), start.month
    for step in rest:
        name, left, length, right = re.fullmatch(r"(\w+) (\d+)-(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
        assert (name, int(left)) == (MONTHS[month - 1], day)
        assert int(length) == calendar.monthrange(YEAR, month)[1] < day
        day, month = int(right), month % 12 + 1
    assert problem.answer == f"{MONTHS[month - 1]} {day}"
    assert 1 <= day <= calendar.monthrange(YEAR, month)[1]


STEPS: dict[str, Callable[[Problem], None]] = {
    "add": check_add,
    "subtract": check_subtract,
    "multiply": check_multiply,
    "total": check_total,
    "sort": check_sort,
    "count": check_count,
    "edit": check_edit,
    "date": check_date,
}


def test_every_task_has_its_solver() -> None:
    assert set(tasks.TASKS) == set(SOLVERS) == set(STEPS)
    assert tasks.DIFFICULTIES == (1, 2, 3, 4)


@each_kind
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_answers_and_steps_are_right(task: str, difficulty: int, seed: int) -> None:
    problem = tasks.TASKS[task](random.Random(seed), difficulty)
    assert (problem.task, problem.difficulty) == (task, difficulty)
    assert problem.answer == SOLVERS[task](problem.question)
    check_equations(problem.steps)
    STEPS[task](problem)
    for text in (problem.question, problem.steps, problem.answer, problem.key):
        assert text.isascii()
        assert text.isprintable()
        assert text == text.strip() != ""


@each_kind
def test_problems_depend_on_the_seed_alone(task: str, difficulty: int) -> None:
    make = lambda seed: tasks.TASKS[task](random.Random(seed), difficulty)
    assert make(5) == make(5)
    assert len({make(seed).question for seed in range(40)}) > 20


def test_rare_dates() -> None:
    """Around February, and around New Year."""
    assert solve_date("What is 1 days after February 28?") == "March 1"
    assert solve_date("What is 80 days after December 31?") == "March 21"
    rng, months = random.Random(0), set()
    for _ in range(1500):
        problem = tasks.TASKS["date"](rng, 4)
        assert problem.answer == solve_date(problem.question)
        months |= {problem.question.split(" ")[-2], problem.answer.split(" ")[0]}
    assert months == set(MONTHS)


@pytest.mark.parametrize("difficulty", tasks.DIFFICULTIES)
def test_difficulty_is_the_size_of_a_problem(difficulty: int) -> None:
    rng = random.Random(1)
    made = {t: [tasks.TASKS[t](rng, difficulty).question for _ in range(300)] for t in tasks.TASKS}
    up_to, longest = set(range(2, difficulty + 2)), {difficulty + 1}
    sizes = {
        task: [[len(str(n)) for n in numbers_of(question)[0]] for question in made[task]]
        for task in ("add", "subtract", "multiply", "total")
    }
    for task in ("add", "subtract"):
        assert {max(each) for each in sizes[task]} == longest
        assert {min(each) for each in sizes[task]} == up_to
    assert {first for first, _ in sizes["subtract"]} == longest
    # The longer number may be the first or the second.
    assert {first for first, _ in sizes["add"]} == {second for _, second in sizes["add"]} == up_to
    assert {tuple(each) for each in sizes["multiply"]} == {(difficulty + 1, 1)}
    assert {len(each) for each in sizes["total"]} == {2 * difficulty + 1}
    assert {len(solve_sort(question)) for question in made["sort"]} == {2 * difficulty + 2}
    assert {len(letters_of(question)) for question in made["count"]} == {4 * difficulty}
    assert {question.count(",") + 1 for question in made["edit"]} == {difficulty}
    days = {date_of(question)[0] for question in made["date"]}
    assert 20 * (difficulty - 1) < min(days) < 20 * difficulty - 15
    assert max(days) == 20 * difficulty


@pytest.mark.parametrize("difficulty", tasks.DIFFICULTIES)
def test_no_count_is_too_good_a_guess(difficulty: int) -> None:
    rng = random.Random(2)
    problems = [tasks.TASKS["count"](rng, difficulty) for _ in range(1500)]
    answers = collections.Counter(problem.answer for problem in problems)
    assert len(answers) >= 5
    assert max(answers.values()) < 1.4 * 1500 / len(answers)
    letters = collections.Counter(x for problem in problems for x in letters_of(problem.question))
    assert len(letters) == 24
    assert max(letters.values()) < 1.5 * min(letters.values())


# --- the two sets


def same(task: str, question: str) -> tuple:
    """What a problem is, however it is asked."""
    if task in ("add", "total"):
        return task, *sorted(numbers_of(question)[0])
    if task == "sort":
        return task, solve_sort(question)
    if task == "count":
        return task, *sorted(letters_of(question))
    return task, question


def some(task: str, difficulty: int, split: Literal["train", "held-out"], count: int, seed: int):
    problems = tasks.draw(task, difficulty, random.Random(seed), split)
    return list(itertools.islice(problems, count))


@each_kind
def test_both_sets_are_there(task: str, difficulty: int) -> None:
    for split in ("train", "held-out"):
        found = some(task, difficulty, split, 60, 3)
        assert {problem.split for problem in found} == {split}
        assert len({problem.question for problem in found}) > 15


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_held_out_problem_is_learnt_in_any_form(task: str) -> None:
    learnt, asked = set(), set()
    for difficulty in tasks.DIFFICULTIES:
        for seed in (0, 1):
            for problem in some(task, difficulty, "train", 500, seed):
                learnt.add(same(task, problem.question))
            for problem in some(task, difficulty, "held-out", 100, seed + 10):
                asked.add(same(task, problem.question))
    assert learnt
    assert asked
    assert not learnt & asked


@pytest.mark.parametrize("task", ["add", "total", "sort", "count"])
def test_the_order_of_things_makes_no_other_problem(task: str) -> None:
    found: dict[tuple, set[str]] = collections.defaultdict(set)
    splits: dict[tuple, set[str]] = collections.defaultdict(set)
    rng = random.Random(0)
    for _ in range(6000):
        problem = tasks.TASKS[task](rng, 1)
        found[same(task, problem.question)].add(problem.question)
        splits[same(task, problem.question)].add(problem.split)
    # The same things did come in several orders, and always in the same set.
    assert sum(len(questions) > 1 for questions in found.values()) > 50
    assert {len(each) for each in splits.values()} == {1}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_equal_keys_have_equal_answers(task: str) -> None:
    answers: dict[str, set[str]] = collections.defaultdict(set)
    splits: dict[str, set[str]] = collections.defaultdict(set)
    rng = random.Random(0)
    for difficulty in tasks.DIFFICULTIES:
        for _ in range(800):
            problem = tasks.TASKS[task](rng, difficulty)
            answers[problem.key].add(problem.answer)
            splits[problem.key].add(problem.split)
    assert {len(each) for each in answers.values()} == {1}
    assert {len(each) for each in splits.values()} == {1}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_about_an_eighth_is_held_out(task: str) -> None:
    keys = {}
    rng = random.Random(0)
    for _ in range(1500):
        problem = tasks.TASKS[task](rng, 3)
        keys[problem.key] = problem.split
    share = sum(split == "held-out" for split in keys.values()) / len(keys)
    assert 0.08 < share < 0.17


@pytest.mark.parametrize("task", tasks.TASKS)
def test_harder_is_longer(task: str) -> None:
    for split in ("train", "held-out"):
        lengths = [
            sum(len(p.question) + len(p.steps) for p in some(task, difficulty, split, 200, 4))
            for difficulty in tasks.DIFFICULTIES
        ]
        assert lengths == sorted(lengths)
        assert lengths[0] * 1.1 < lengths[-1]


@pytest.mark.parametrize("seed", [0, 1])
def test_enough_easy_questions_are_held_out(seed: int) -> None:
    lines = list(files.questions(tuple(tasks.TASKS), 50, seed))
    assert len({line["messages"][0]["content"] for line in lines}) == len(lines)
    asked = collections.Counter((line["task"], line["difficulty"]) for line in lines)
    assert set(asked) == set(KINDS)
    assert min(asked.values()) >= 15
    assert all(count == 50 for kind, count in asked.items() if kind != ("total", 1))
