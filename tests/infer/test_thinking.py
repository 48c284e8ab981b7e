"""The thinking budget, against a plain walk over the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import pangu_jax
from infer import decode, generation, thinking
from infer.output import Completion
from infer.sampling import Sampling
from infer.thinking import NO_BUDGET, NOT_THINKING, Budget
from pangu_jax.config import ModelConfig, configs_folder
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer
from tests import spm

V = 1024
START, END = 21, 22
NEVER, ALWAYS = -1e4, 1e4
ENDS = "。！？；.!?;\n"
FREE = Sampling(max_new_tokens=48, temperature=1.0, seed=3, ignore_eos=True)
# A prompt that leaves a thought open, with a closed one before it.
OPEN = [1, 5, START, 7, END, 9, START, 491]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.load(configs_folder() / "tokenizers" / "nano")
    assert (tokenizer.id("[unused16]"), tokenizer.id("[unused17]")) == (START, END)
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Pangu:
    """Random weights: any of the 1024 tokens may come next, were it not for biases."""
    config = ModelConfig(
        vocab_size=V,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e4,
        max_positions=256,
        intermediate_size=32,
        dtype="float32",
    )
    return pangu_jax.init(config, jax.random.key(0))


def asked(budget: int | None, **changes: object) -> Sampling:
    return Sampling(**{**vars(FREE), "thinking_budget": budget, **changes})


def ends_sentence(tokenizer: Tokenizer, id: int) -> bool:
    return tokenizer.pieces[id][-1] in ENDS or tokenizer.pieces[id] == "<0x0A>"


def closing(tokenizer: Tokenizer, thought: list[int], budget: int) -> int:
    """How many tokens an endless thought gets."""
    for used in range(budget):
        late = 8 * (budget - used) <= budget
        if used and late and ends_sentence(tokenizer, thought[used - 1]):
            return used
    return budget


def thoughts(ids: list[int], is_open: bool) -> list[int]:
    """The length of every thought, the last perhaps unfinished; markers within one count."""
    lengths, used = [], 0 if is_open else None
    for token in ids:
        if used is None:
            used = 0 if token == START else None
        elif token == END:
            lengths, used = [*lengths, used], None
        else:
            used += 1
    return lengths if used is None else [*lengths, used]


# --- the rules alone ------------------------------------------------------------------------------


def test_closes_by_enumeration() -> None:
    """Every budget, every length, after the end of a sentence and in the middle."""
    cases = [(n, used, last) for n in range(34) for used in range(-1, 36) for last in (0, 1)]
    limit, used, last = jnp.array(cases, jnp.int32).T
    sentence = jnp.array([False, True])
    rules = Budget(limit, jnp.int32(5), jnp.int32(6), sentence)
    got = np.asarray(rules.closes(used, last))
    for closes, (n, used, last) in zip(got, cases, strict=True):
        late = used > 0 and 8 * (n - used) <= n and last == 1
        assert closes == (used >= 0 and (used >= n or late)), (n, used, last)


def test_count_by_enumeration() -> None:
    """Markers open and close; a start marker within a thought is one of its tokens."""
    cases = [(used, token) for used in (NOT_THINKING, 0, 1, 7) for token in (4, 5, 6, -1)]
    used, token = jnp.array(cases, jnp.int32).T
    rules = Budget(jnp.full(len(cases), 9), jnp.int32(5), jnp.int32(6), jnp.zeros(8, bool))
    got = rules.count(used, token).tolist()
    for after, (used, token) in zip(got, cases, strict=True):
        if token == 6:
            assert after == NOT_THINKING
        elif used == NOT_THINKING:
            assert after == (0 if token == 5 else NOT_THINKING)
        else:
            assert after == used + 1


def test_sentence_ends_and_markers_are_the_tokenizers(tokenizer: Tokenizer) -> None:
    made = thinking.budget(tokenizer, [3, None], V)
    assert (int(made.start), int(made.end)) == (START, END)
    assert made.limit.tolist() == [3, NO_BUDGET]
    wanted = [id for id in range(V) if ends_sentence(tokenizer, id)]
    assert np.flatnonzero(made.ends_sentence).tolist() == wanted
    assert 3 < len(wanted) < 60
    wide = thinking.budget(tokenizer, [3], V + 10)  # a matrix larger than the vocabulary
    assert not wide.ends_sentence[V:].any()
    assert thinking.budget(tokenizer, [3], 100).ends_sentence.shape == (100,)


@pytest.mark.parametrize(
    ("prompt", "used"),
    [
        ([1], NOT_THINKING),
        ([START], 0),
        (OPEN, 0),
        ([START, 4, END], NOT_THINKING),
        ([END, 4], NOT_THINKING),
        ([END, START], 0),
        ([START, START, END], NOT_THINKING),
    ],
)
def test_thoughts_that_prompts_leave_open(
    tokenizer: Tokenizer, prompt: list[int], used: int
) -> None:
    made = thinking.budget(tokenizer, [3], V)
    assert thinking.used_in_prompt(made, np.array(prompt, np.int32)) == used


def test_no_markers_no_budget(model: Pangu, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = spm.write(tmp_path_factory.mktemp("bare"), "char", tokenizer_config={})
    bare = Tokenizer.load(folder)
    assert bare.id("[unused16]") is None
    with pytest.raises(InputError, match="thinking_budget: the model and its tokenizer have no"):
        infer.generate(model, [[1]], asked(3), tokenizer=bare)
    with pytest.raises(InputError, match="thinking_budget needs a tokenizer"):
        infer.generate(model, [[1]], asked(3))


# --- a whole model --------------------------------------------------------------------------------


def four(
    model: Pangu, tokenizer: Tokenizer, rows: list[Sampling], prompt: list[int] = OPEN
) -> list[Completion]:
    return infer.generate(model, [prompt] * len(rows), rows, tokenizer=tokenizer)


def check_same(got: Completion, wanted: Completion, size: int | None = None) -> None:
    """The same tokens and numbers, as far as `size`; batches of other sizes round otherwise."""
    assert got.token_ids[:size] == wanted.token_ids[:size]
    np.testing.assert_allclose(got.logprobs[:size], wanted.logprobs[:size], atol=1e-4)


def check_closed(tokenizer: Tokenizer, got: Completion, free: Completion, budget: int) -> None:
    """Closed at its place; before, everything is as without a budget."""
    size = closing(tokenizer, free.token_ids, budget)
    check_same(got, free, size)
    assert got.token_ids[size] == END
    assert got.logprobs[size] == 0.0
    assert thoughts(got.token_ids, True)[0] == size


def test_an_endless_thought_is_closed_at_the_budget(model: Pangu, tokenizer: Tokenizer) -> None:
    """Rows with and without a budget in one batch; the end marker could not come by itself."""
    endless = {END: NEVER}
    rows = [asked(n, logit_bias=endless) for n in (None, 0, 5, 17)]
    free, *closed = four(model, tokenizer, rows)
    assert END not in free.token_ids
    check_same(*four(model, tokenizer, rows[:1]), free)
    for n, got in zip((0, 5, 17), closed, strict=True):
        check_closed(tokenizer, got, free, n)
        assert len(got.token_ids) == 48


def test_the_last_eighth_ends_with_a_sentence(model: Pangu, tokenizer: Tokenizer) -> None:
    stop = tokenizer.id("。")
    assert stop is not None
    often = {END: NEVER, stop: 5.0}
    sizes = set()
    for seed in range(12):
        rows = [asked(n, logit_bias=often, seed=seed) for n in (None, 40, 24, 7)]
        free, *closed = four(model, tokenizer, rows)
        for n, got in zip((40, 24, 7), closed, strict=True):
            check_closed(tokenizer, got, free, n)
            sizes.add(thoughts(got.token_ids, True)[0])
    assert {7, 21, 40} <= sizes
    assert len(sizes) > 5
    always = four(model, tokenizer, [asked(n, logit_bias={stop: ALWAYS}) for n in (40, 16, 8, 1)])
    assert [thoughts(each.token_ids, True)[0] for each in always] == [35, 14, 7, 1]


def test_a_thought_begun_in_the_answer(model: Pangu, tokenizer: Tokenizer) -> None:
    """Thoughts that come and go by chance never exceed their budgets; nothing else is touched."""
    often = {START: 5.0, END: 2.0}
    rows = [asked(n, logit_bias=often) for n in (None, 0, 3, 8)]
    free, *closed = four(model, tokenizer, rows, [1, 5])
    assert max(thoughts(free.token_ids, False)) > 8
    first = free.token_ids.index(START) + 1
    for n, got in zip((0, 3, 8), closed, strict=True):
        assert got.token_ids[:first] == free.token_ids[:first]
        assert max(thoughts(got.token_ids, False)) <= n
    rows = [asked(n, logit_bias={START: NEVER}) for n in (None, 0, 3, 8)]
    free, *others = four(model, tokenizer, rows, [1, 5])
    for each in others:
        check_same(each, free)


def test_a_repeated_start_marker_buys_no_time(model: Pangu, tokenizer: Tokenizer) -> None:
    rows = [asked(n, logit_bias={START: ALWAYS}) for n in (4, 1, 0, 9)]
    for n, got in zip((4, 1, 0, 9), four(model, tokenizer, rows, [1, 5]), strict=True):
        wanted = [START, *[START] * n, END] * 48
        assert got.token_ids == wanted[:48]


def test_a_thought_that_ends_by_itself(model: Pangu, tokenizer: Tokenizer) -> None:
    """A budget that is not reached changes nothing."""
    free = four(model, tokenizer, [asked(None, logit_bias={END: 5.0})] * 4)
    lengths = thoughts(free[0].token_ids, True)
    rows = [asked(n, logit_bias={END: 5.0}) for n in (2 * lengths[0] + 8, 100, 2**31 - 1, None)]
    for got in four(model, tokenizer, rows):
        check_same(got, free[0])


def test_streams_and_dispatches_of_any_size(model: Pangu, tokenizer: Tokenizer) -> None:
    settings = asked(9, logit_bias={END: NEVER})
    (whole,) = four(model, tokenizer, [settings])
    assert END in whole.token_ids
    for steps in (1, 4):
        batch = generation.Decoding(model, [OPEN], settings, tokenizer)
        while batch.alive:
            batch.step(steps)
        assert batch.rows[0].completion == whole
    assert list(generation.stream(model, OPEN, settings, tokenizer=tokenizer))[-1] == whole


def test_completions_of_one_prompt_think_apart(model: Pangu, tokenizer: Tokenizer) -> None:
    together = four(model, tokenizer, [asked(6, logit_bias={END: NEVER}, n=3)])
    assert len({tuple(each.token_ids) for each in together}) == 3
    for each in together:
        assert thoughts(each.token_ids, True)[0] <= 6
    check_same(*four(model, tokenizer, [asked(6, logit_bias={END: NEVER})]), together[0])


def test_forced_tokens_are_history_and_may_end_a_row(model: Pangu, tokenizer: Tokenizer) -> None:
    (got,) = four(model, tokenizer, [asked(3, stop_token_ids=(END,), logit_bias={END: NEVER})])
    assert (len(got.token_ids), got.token_ids[-1], got.finish_reason) == (4, END, "stop")
    (cut,) = four(model, tokenizer, [asked(3, max_new_tokens=3, logit_bias={END: NEVER})])
    assert (cut.token_ids, cut.finish_reason) == (got.token_ids[:3], "length")


def test_budgets_are_data(model: Pangu, tokenizer: Tokenizer) -> None:
    """Requests with budgets share one program whatever they are; others keep theirs."""
    generate = lambda *budgets: four(model, tokenizer, [asked(n) for n in budgets])
    decode.decode.clear_cache()
    generate(None, None)
    plain = decode.decode._cache_size()
    generate(3, None)
    assert decode.decode._cache_size() == 2 * plain
    generate(0, 2**31 - 1)
    generate(40, 7)
    generate(None, None)
    assert decode.decode._cache_size() == 2 * plain
