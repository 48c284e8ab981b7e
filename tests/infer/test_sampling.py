"""Choosing tokens, against exact enumeration on small vocabularies.

`processed` is the oracle: plain float64, written from the definitions of `Sampling`'s fields.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infer import inputs, sampler
from infer.sampler import Choice, Controls, History, Shaping
from infer.sampling import Sampling
from pangu_jax.errors import InputError

V = 7
ROWS = 4
DRAWS = 4096
# A float32 comparison of numbers closer than this may come out either way.
NEAR = 1e-4

choose = jax.jit(sampler.choose, static_argnames="top")


def shaped(logits: Any, s: Sampling, prompt: Any = (), answer: Any = ()) -> np.ndarray:
    """Bias and penalties of a prompt's and an answer's tokens, one token at a time."""
    z = np.array(logits, np.float64)
    prompt, answer = list(prompt), list(answer)
    for token in range(len(z)):
        z[token] += np.float32(s.logit_bias.get(token, 0))
        times = answer.count(token)
        if times or token in prompt:
            by = float(np.float32(s.repetition_penalty))
            z[token] = z[token] / by if z[token] > 0 else z[token] * by
        z[token] -= times * np.float32(s.frequency_penalty)
        z[token] -= np.float32(s.presence_penalty) if times else 0
    return z


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def processed(z: np.ndarray, s: Sampling) -> tuple[np.ndarray, float]:
    """Log-probabilities of shaped logits after temperature and cuts, and how far the nearest number
    is that would have cut elsewhere. Every cut keeps what equals the last token it keeps.
    """
    if s.temperature == 0:
        return log_softmax(z), np.inf
    z = z / float(np.float32(s.temperature))
    lowest, margin = -np.inf, np.inf
    if 0 < s.top_k < len(z):
        lowest = sorted(z)[-s.top_k]
    p = np.exp(log_softmax(np.where(z >= lowest, z, -np.inf)))
    if s.top_p < 1:
        heads = [(logit, p[z >= logit].sum()) for logit in sorted(set(z), reverse=True)]
        lowest = max(
            lowest, next(logit for logit, mass in heads if mass >= min(s.top_p, heads[-1][1]))
        )
        margin = min(abs(mass - s.top_p) for _, mass in heads)
    if s.min_p > 0:
        least = z.max() + np.log(s.min_p)
        lowest = max(lowest, least)
        margin = margin if s.min_p == 1 else min(margin, abs(z - least).min())
    return log_softmax(np.where(z >= lowest, z, -np.inf)), margin


def controls(rows: list[Sampling], keys: jax.Array | None = None, shaping: bool = True) -> Controls:
    floats = lambda name: jnp.array([getattr(s, name) for s in rows], jnp.float32)
    bias = [[s.logit_bias.get(token, 0.0) for token in range(V)] for s in rows]
    penalties = map(floats, ("repetition_penalty", "presence_penalty", "frequency_penalty"))
    if keys is None:
        keys = jax.vmap(jax.random.key)(jnp.array([s.seed or 0 for s in rows]))
    return Controls(
        floats("temperature"),
        jnp.array([s.top_k for s in rows], jnp.int32),
        floats("top_p"),
        floats("min_p"),
        keys,
        Shaping(*penalties, jnp.array(bias, jnp.float32)) if shaping else None,
    )


def history(prompts: list[list[int]], answers: list[list[int]]) -> History:
    seen = np.array([[token in prompt for token in range(V)] for prompt in prompts])
    counts = np.array([[answer.count(token) for token in range(V)] for answer in answers], np.int32)
    return History(jnp.asarray(seen), jnp.asarray(counts))


@functools.cache
def fixed_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, V).astype(np.float32)


def many_draws(s: Sampling, keys: jax.Array | None = None) -> tuple[Choice, np.ndarray]:
    """DRAWS draws of one setting, at as many positions or with as many keys; the distribution."""
    logits, prompt, answer = fixed_logits(1), [0, 2], [2, 2, 5]
    positions = jnp.arange(DRAWS) if keys is None else jnp.full(DRAWS, 3)
    choice = choose(
        jnp.broadcast_to(jnp.asarray(logits), (DRAWS, V)),
        controls([s] * DRAWS, keys),
        positions,
        history([prompt] * DRAWS, [answer] * DRAWS),
        top=0,
    )
    logprobs, margin = processed(shaped(logits, s, prompt, answer), s)
    assert margin > NEAR
    return choice, np.exp(logprobs)


# The 0.1% points of chi-square with 1 to 6 degrees of freedom.
RARE = (10.83, 13.82, 16.27, 18.47, 20.52, 22.46)


def check_frequencies(tokens: Any, p: np.ndarray) -> None:
    counts = np.bincount(np.asarray(tokens), minlength=V)
    possible = p > 0
    assert not counts[~possible].any()
    wanted = len(tokens) * p[possible]
    assert wanted.min() >= 5
    assert ((counts[possible] - wanted) ** 2 / wanted).sum() < RARE[possible.sum() - 2]


# Quarters, so that float32 and float64 agree about ties.
quarters = lambda low, high: st.integers(4 * low, 4 * high).map(lambda n: n / 4)
tokens = st.lists(st.integers(0, V - 1), max_size=5)
asked = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([0.0, 0.5, 0.7, 1.0, 2.5]),
        top_k=st.integers(-1, V + 2),
        top_p=st.just(1.0) | st.floats(0.01, 0.999),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.37, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
        presence_penalty=st.just(0.0) | quarters(-2, 2),
        frequency_penalty=st.just(0.0) | quarters(-2, 2),
        logit_bias=st.dictionaries(
            st.integers(0, V - 1), quarters(-4, 4) | st.sampled_from([-1e4, 100.0]), max_size=3
        ),
    )
)
row = st.tuples(st.lists(quarters(-5, 5), min_size=V, max_size=V), asked, tokens, tokens)


@settings(deadline=None, max_examples=150)
@given(st.lists(row, min_size=ROWS, max_size=ROWS))
def test_every_setting_against_enumeration(rows: list[tuple]) -> None:
    logits, said, prompts, answers = map(list, zip(*rows, strict=True))
    each = [Sampling(**fields) for fields in said]
    wanted, scores = [], []
    for i in range(ROWS):
        z = shaped(logits[i], each[i], prompts[i], answers[i])
        logprobs, margin = processed(z, each[i])
        gaps = np.abs(z[:, None] - z)
        assume(margin > NEAR and ((gaps == 0) | (gaps > NEAR)).all())
        wanted.append(logprobs)
        scores.append(z)
    choice = choose(
        jnp.array(logits, jnp.float32),
        controls(each),
        jnp.arange(ROWS),
        history(prompts, answers),
        top=V,
    )
    assert choice.top is not None
    for i in range(ROWS):
        token = int(choice.token[i])
        ids, logprobs = np.asarray(choice.top[0][i]), np.asarray(choice.top[1][i])
        if each[i].temperature == 0:
            assert token == scores[i].argmax()  # the first of equals
        assert np.isfinite(wanted[i][token])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
        close(choice.logprob[i], wanted[i][token])
        assert sorted(ids) == list(range(V))
        close(logprobs, wanted[i][ids])
        assert sorted(logprobs, reverse=True) == logprobs.tolist()


def test_history_counts_prompts_and_living_rows() -> None:
    prompt, mask = jnp.array([[3, 3, 1], [2, 0, 0]]), jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    seen = History.of(prompt, mask, V)
    np.testing.assert_array_equal(np.argwhere(np.asarray(seen.prompt)), [[0, 1], [0, 3], [1, 2]])
    seen = seen.add(jnp.array([4, -1]), jnp.array([True, False]))
    seen = seen.add(jnp.array([4, 5]), jnp.array([True, True]))
    np.testing.assert_array_equal(np.argwhere(np.asarray(seen.counts)), [[0, 4], [1, 5]])
    assert (int(seen.counts[0, 4]), int(seen.counts[1, 5])) == (2, 1)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0, "top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 1.4},
        {"repetition_penalty": 1.8, "frequency_penalty": 0.3, "presence_penalty": -0.5},
        {"logit_bias": {3: 1.5, 6: -1e4}, "temperature": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(asked: dict) -> None:
    """Over positions, whose neighbours are independent too."""
    choice, p = many_draws(Sampling(**{"temperature": 1.0, "seed": 5, **asked}))
    drawn = np.asarray(choice.token)
    check_frequencies(drawn, p)
    np.testing.assert_allclose(choice.logprob, np.log(p[drawn]), atol=1e-4)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (drawn[:-1], drawn[1:]), 1)
    wanted = np.outer(p, p) * (DRAWS - 1)
    common = wanted >= 5
    z = (((pairs - wanted)[common]) ** 2 / wanted[common]).sum()
    assert z < common.sum() + 3.1 * np.sqrt(2 * common.sum()) + 8  # beyond its 0.1% point


def test_draws_of_seeds_and_completions_follow_the_distribution() -> None:
    """At one position: 1024 completions of each of four seeds, then 4096 seeds."""
    s = Sampling(temperature=1.0)
    seeded = [dataclasses.replace(s, seed=seed, n=1024) for seed in range(4)]
    check_frequencies(*_tokens_and_p(s, inputs._keys(seeded, 0)))
    seeded = [dataclasses.replace(s, seed=seed) for seed in range(DRAWS)]
    check_frequencies(*_tokens_and_p(s, inputs._keys(seeded, 0)))


def _tokens_and_p(s: Sampling, keys: jax.Array) -> tuple[jax.Array, np.ndarray]:
    choice, p = many_draws(s, keys)
    return choice.token, p


def test_a_draw_depends_on_key_and_position_only() -> None:
    """Not on the other rows, their order or their settings."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, V)), jnp.float32)
    at = jnp.array([3, 9, 3, 8])
    hot = Sampling(temperature=1.0, seed=3)
    rows = [hot, dataclasses.replace(hot, top_k=3, presence_penalty=1.0), Sampling(), hot]
    none: list[list[int]] = [[]] * ROWS
    together = choose(logits, controls(rows), at, history(none, none), top=V).token
    back = jnp.arange(ROWS)[::-1]
    reverse = choose(logits[back], controls(rows[::-1]), at[back], history(none, none), top=V).token
    np.testing.assert_array_equal(together, reverse[back])
    for i in range(ROWS):
        alone = choose(logits[i : i + 1], controls([rows[i]], shaping=False), at[i : i + 1])
        assert together[i] == alone.token[0]


def test_keys_are_of_seed_and_completion_alone() -> None:
    raw = lambda *rows: jax.random.key_data(inputs._keys(list(rows), 1)).tolist()
    one, three, other = Sampling(seed=7), Sampling(seed=7, n=3), Sampling(seed=8)
    assert raw(three)[0] == raw(one)[0] == raw(other, one)[1]
    assert raw(one, three)[1:4] == raw(three, one)[:3]
    distinct = raw(three, other)[:4]
    assert len({tuple(key) for key in distinct}) == 4
    unseeded = raw(Sampling(n=2), Sampling(n=2))[:4]
    assert len({tuple(key) for key in unseeded}) == 4
    assert raw(Sampling(seed=-1))[0] == raw(Sampling(seed=2**31 - 1))[0]  # taken modulo 2**31


@pytest.mark.parametrize(
    ("logits", "asked"),
    [
        ([30.0, 20.0, 10.0, 0.0, 0.0, 0.0, 0.0], {"temperature": 2e-38}),
        ([0.0, -30.0, -20.0, -1.0, -5.0, -9.0, -9.0], {"temperature": 1e-30}),
        ([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0], {"top_p": 1e-30, "temperature": 1e37}),
        ([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0], {"top_p": 1e-30, "min_p": 1.0, "top_k": 1}),
        ([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0], {"temperature": 1.0, "logit_bias": {0: 1e6}}),
        ([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0], {"temperature": 0.1, "logit_bias": {0: 1e6}}),
        ([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0], {"temperature": 1.0, "min_p": 1e-300}),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.25], {"temperature": 2.5, "min_p": 1.0}),
    ],
    ids=str,
)
def test_extreme_settings_stay_finite(logits: list[float], asked: dict) -> None:
    """However cold or narrow: the likeliest token can be chosen, and no number is NaN."""
    s = Sampling(**{"temperature": 1.0, **asked})
    none: list[list[int]] = [[]] * ROWS
    choice = choose(
        jnp.broadcast_to(jnp.array(logits), (ROWS, V)),
        controls([s] * ROWS),
        jnp.arange(ROWS),
        history(none, none),
        top=V,
    )
    assert choice.top is not None
    assert jnp.isfinite(choice.logprob).all()
    assert not jnp.isnan(choice.top[1]).any()
    if asked.get("temperature") != 1e37 and "min_p" not in asked:
        assert (choice.token == 0).all()


def past_type_checks(said: Mapping[str, Any]) -> Sampling:
    """Made as by a user without the run-time type checks of the tests."""
    made = object.__new__(Sampling)
    for field in dataclasses.fields(Sampling):
        default = {} if field.name == "logit_bias" else field.default
        object.__setattr__(made, field.name, said.get(field.name, default))
    made.__post_init__()
    return made


HUGE = 10**5000  # Python refuses to print it
NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 2.5, 2**31, HUGE, "5", None, True, [5]],
    "temperature": [-0.1, NAN, INF, "hot", None, True, HUGE, 1e39, [1.0], 1j],
    "top_k": [-2, 1.0, 2**32 + 1, HUGE, "all", None, False],
    "top_p": [0.0, -0.5, 1.1, 1e-50, NAN, None, "1"],
    "min_p": [-0.1, 1.1, NAN, INF, "0", None, True],
    "repetition_penalty": [0.0, -1.0, NAN, INF, 1e-300, None, "1"],
    "presence_penalty": [NAN, INF, -INF, 1e39, HUGE, -HUGE, "1", None, True],
    "frequency_penalty": [NAN, INF, -INF, 1e39, HUGE, "1", None],
    "logit_bias": [
        {"5": 1.0},
        {5: "1"},
        {5: NAN},
        {5: INF},
        {5: None},
        {5: True},
        {True: 1.0},
        {1.5: 1.0},
        {HUGE: 1.0},
        {5: HUGE},
        {"a\nb": 1.0},
        [5],
        5,
        "ab",
        None,
    ],
    "seed": [1.5, 2**31, -(2**31), HUGE, "7", True, NAN, [1]],
    "n": [0, -1, 1025, HUGE, 1.0, "2", None, True],
    "top_logprobs": [-1, 101, HUGE, 1.5, "5", None, True],
    "stop_token_ids": [3, (2**40,), (HUGE,), (1.5,), "12", None, (None,), (True,), [[1]]],
    "stop": [("",), "", (3,), (b"a",), 3, None, [["a"]], ("a", None)],
    "ignore_eos": ["no", None, 2, []],
    "thinking_budget": [-1, 1.5, 2**31, HUGE, "5", True, [1]],
}


@pytest.mark.parametrize("name", BAD)
def test_senseless_settings_are_refused(name: str) -> None:
    """With one line that names the field."""
    for value in BAD[name]:
        with pytest.raises(InputError, match=name) as error:
            past_type_checks({name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("stop", "ignore_eos")])
def test_a_complaint_is_short_and_of_one_line(name: str) -> None:
    """Whatever was said: arrays are printed over several lines, and text may be long."""
    for value in (np.zeros((3, 3)), np.zeros((3, 3, 3)), "x" * 10_000, ["y" * 10_000], ["\n"]):
        with pytest.raises(InputError, match=name) as error:
            past_type_checks({name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 200


def test_defaults_are_greedy_and_off() -> None:
    off = Sampling()
    assert (off.temperature, off.n, off.top_logprobs) == (0, 1, 0)
    assert not off.shapes_logits
    assert off.needs_tokenizer is None
    asked = [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {3: 0.0}},
    ]
    assert all(Sampling(**each).shapes_logits for each in asked)
    assert Sampling(stop=("a",)).needs_tokenizer == "stop"
    assert Sampling(thinking_budget=0).needs_tokenizer == "thinking_budget"


def test_containers_and_scalars_of_other_kinds() -> None:
    """Lists and single strings become tuples, NumPy numbers are numbers, a caller's later changes
    do not reach the settings.
    """
    bias = {3: 1}
    made = past_type_checks({"stop": "ab", "stop_token_ids": [3, np.int32(4)], "logit_bias": bias})
    bias[3] = 2
    assert (made.stop, made.stop_token_ids, made.logit_bias) == (("ab",), (3, 4), {3: 1})
    assert isinstance(hash(made), int)
    for kind in (np.int8, np.uint8, np.int32, np.uint64):
        numbers = {"seed": kind(5), "n": kind(2), "max_new_tokens": kind(3), "top_k": kind(1)}
        same = Sampling(seed=5, n=2)
        keys = [inputs._keys([each], 0) for each in (past_type_checks(numbers), same)]
        np.testing.assert_array_equal(*map(jax.random.key_data, keys))
    with pytest.raises(InputError, match="seed"):
        past_type_checks({"seed": np.int32(-(2**31))})
