"""Generated tokens: the reference's, whatever the batch, the form, the padding and the chunks."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import pangu_jax
from infer import decode, generation, inputs
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from tests.infer.test_sampling import log_softmax, processed, shaped

ORACLE = Path(__file__).parent.parent / "oracle"
GREEDY = Sampling(max_new_tokens=32, ignore_eos=True)


@pytest.fixture(scope="module", params=["dense-tiny", "moge-tiny"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["separate", "stacked"])
def model(request: pytest.FixtureRequest, name: str) -> Pangu:
    return pangu_jax.load(ORACLE / name, form=request.param)


@pytest.fixture(scope="module")
def tiny() -> Pangu:
    return pangu_jax.load(ORACLE / "dense-tiny")


@pytest.fixture(scope="module")
def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(ORACLE / name / "expected.npz"))


def prompts_of(expected: dict[str, np.ndarray]) -> list[list[int]]:
    return [expected[f"prompt_{i}_input_ids"].tolist() for i in range(4)]


def test_ragged_batch_and_singles_are_the_reference(model: Pangu, expected: dict) -> None:
    prompts = prompts_of(expected)
    together = infer.generate(model, prompts, GREEDY)
    for i, prompt in enumerate(prompts):
        wanted = expected[f"prompt_{i}_gen"].tolist()
        assert together[i].token_ids == wanted
        assert infer.generate(model, [prompt], GREEDY)[0].token_ids == wanted


def test_logprobs_are_those_of_a_full_pass(model: Pangu, expected: dict) -> None:
    prompt = prompts_of(expected)[1]
    (completion,) = infer.generate(model, [prompt], GREEDY)
    whole = np.array([prompt + completion.token_ids])
    z = jax.nn.log_softmax(model(whole)[0, len(prompt) - 1 : -1])
    full = np.take_along_axis(np.asarray(z), np.array(completion.token_ids)[:, None], 1)[:, 0]
    np.testing.assert_allclose(completion.logprobs, full, atol=1e-4)


def test_long_generation_grows_the_cache_and_stays_equal(tiny: Pangu) -> None:
    """Across chunks and cache sizes: every token is the argmax of the full pass over what came
    before.
    """
    (completion,) = infer.generate(tiny, [[1, 5, 9]], Sampling(max_new_tokens=700, ignore_eos=True))
    assert len(completion.token_ids) == 700
    whole = np.array([[1, 5, 9, *completion.token_ids]])
    logits = np.asarray(tiny(whole))[0, 2:-1]
    # Where two logits nearly tie, cached and full passes may round differently.
    gap = logits.max(-1) - logits[np.arange(700), completion.token_ids]
    assert gap.max() < 1e-3


def test_eos_ends_a_row_and_only_that_row(tiny: Pangu) -> None:
    prompts = [[1, 5, 9], [4, 4]]
    free = infer.generate(tiny, prompts, GREEDY)
    eos = free[0].token_ids[6]
    first = free[0].token_ids.index(eos)
    assert eos not in free[1].token_ids
    stopping = Sampling(max_new_tokens=32, stop_token_ids=(eos,), ignore_eos=True)
    stopped = infer.generate(tiny, prompts, stopping)
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]  # the end token is included
    assert stopped[0].finish_reason == "stop"
    assert stopped[1].token_ids == free[1].token_ids
    assert stopped[1].finish_reason == "length"
    assert len(stopped[0].logprobs) == len(stopped[0].token_ids)


def test_eos_comes_from_the_models_config(tiny: Pangu) -> None:
    free = infer.generate(tiny, [[1, 5, 9]], GREEDY)[0]
    config = dataclasses.replace(tiny.config, eos_token_ids=(500, free.token_ids[3]))
    other = Pangu(config, tiny.form, tiny.dtype, tiny.layout, tiny.mesh)
    other = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(tiny))
    got = infer.generate(other, [[1, 5, 9]], Sampling(max_new_tokens=32))[0]
    assert got.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]
    assert infer.generate(other, [[1, 5, 9]], GREEDY)[0].token_ids == free.token_ids


@pytest.mark.parametrize("new", [1, 2, 31, 32, 33, 34, 65])
def test_max_new_tokens_around_chunks(tiny: Pangu, new: int) -> None:
    longest = infer.generate(tiny, [[1, 5, 9]], Sampling(max_new_tokens=65, ignore_eos=True))[0]
    got = infer.generate(tiny, [[1, 5, 9]], Sampling(max_new_tokens=new, ignore_eos=True))[0]
    assert got.token_ids == longest.token_ids[:new]
    assert got.finish_reason == "length"


def test_the_last_position_ends_a_row(tiny: Pangu) -> None:
    last = tiny.config.max_positions
    prompt = np.random.default_rng(0).integers(0, 512, last - 2).tolist()
    (got,) = infer.generate(tiny, [prompt], Sampling(max_new_tokens=50, ignore_eos=True))
    assert len(got.token_ids) == 3  # the third is chosen after the last position and never fed back
    assert got.finish_reason == "length"


def test_sampling_is_repeatable_and_independent_of_the_batch(tiny: Pangu) -> None:
    settings = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = infer.generate(tiny, [[1, 5, 9]], settings)[0]
    together = infer.generate(tiny, [[8], [1, 5, 9], [3, 3, 3, 3]], settings)[1]
    assert alone.token_ids == together.token_ids
    np.testing.assert_allclose(alone.logprobs, together.logprobs, atol=1e-4)
    other = infer.generate(tiny, [[1, 5, 9]], dataclasses.replace(settings, seed=8))[0]
    assert other.token_ids != alone.token_ids
    unseeded = dataclasses.replace(settings, seed=None)
    a, b = infer.generate(tiny, [[1, 5, 9], [1, 5, 9]], unseeded)
    assert a.token_ids != b.token_ids


PENALISED = Sampling(
    max_new_tokens=20,
    repetition_penalty=1.4,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={7: 1.5, 9: 2.0, 498: -2.5},
    top_logprobs=5,
    ignore_eos=True,
)
HOT = dataclasses.replace(PENALISED, temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=11)


def full_pass(model: Pangu, tokens: list[int]) -> np.ndarray:
    """The logits after the last token, of a pass of one padded length that keeps nothing."""
    padded = np.array([tokens + [0] * (32 - len(tokens))])
    return np.asarray(model(padded, np.arange(32)[None] < len(tokens)))[0, len(tokens) - 1]


@pytest.mark.parametrize("asked", [PENALISED, HOT], ids=["greedy", "sampled"])
def test_every_setting_against_full_passes(tiny: Pangu, asked: Sampling) -> None:
    """A naive loop over the processed distribution: greedy choices, and all numbers."""
    prompts = [[1, 5, 9, 9], [8, 7]]
    for prompt, got in zip(prompts, infer.generate(tiny, prompts, asked), strict=True):
        assert got.top_logprobs is not None
        answer: list[int] = []
        for token, logprob, top in zip(got.token_ids, got.logprobs, got.top_logprobs, strict=True):
            z = shaped(full_pass(tiny, prompt + answer), asked, prompt, answer)
            wanted, _ = processed(z, asked)
            if asked.temperature == 0:
                assert token == z.argmax()
                np.testing.assert_allclose(wanted, log_softmax(z))
            np.testing.assert_allclose(logprob, wanted[token], atol=1e-3)
            assert len(top) == min(5, np.isfinite(wanted).sum())
            np.testing.assert_allclose([*top.values()], wanted[list(top)], atol=1e-3)
            np.testing.assert_allclose(
                [*top.values()], np.sort(wanted)[::-1][: len(top)], atol=1e-3
            )
            answer.append(token)
        assert len(answer) == 20


def same(got: infer.Completion, wanted: infer.Completion) -> None:
    """The same tokens; their numbers but for the rounding of other shapes."""
    assert got.token_ids == wanted.token_ids
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    assert got.finish_reason == wanted.finish_reason


@pytest.mark.slow
def test_several_settings_in_one_batch(tiny: Pangu) -> None:
    """Each row is as alone: whatever the others ask for, their order, number and padding."""
    plain = Sampling(max_new_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    three = dataclasses.replace(plain, seed=3, n=3, top_p=0.8, max_new_tokens=33)
    prompts = [[1, 5, 9], [8], [3, 3, 3, 3]]
    asked = [plain, three, HOT]
    a, b0, b1, b2, c = infer.generate(tiny, prompts, asked)
    assert len({tuple(each.token_ids) for each in (b0, b1, b2)}) == 3
    c2, x0, x1, x2, a2 = infer.generate(tiny, prompts[::-1], asked[::-1])
    for got, wanted in zip((a2, x0, x1, x2, c2), (a, b0, b1, b2, c), strict=True):
        same(got, wanted)
    assert a.top_logprobs is None
    assert c.top_logprobs is not None
    assert c2.top_logprobs is not None
    for prompt, alone, wanted in (
        (prompts[0], plain, a),
        (prompts[1], dataclasses.replace(three, n=1), b0),
        (prompts[2], HOT, c),
    ):
        same(infer.generate(tiny, [prompt], alone)[0], wanted)
    wide = infer.generate(tiny, [[2] * 20, prompts[0]], plain)[1]
    same(wide, a)
    for got, wanted in zip(infer.generate(tiny, [prompts[1]], three), (b0, b1, b2), strict=True):
        same(got, wanted)


@pytest.mark.parametrize("steps", [1, 5, 31, 100])
def test_dispatches_of_any_size(tiny: Pangu, steps: int) -> None:
    """Also of more than a CHUNK: no token is lost."""
    asked = dataclasses.replace(HOT, max_new_tokens=70, top_logprobs=0)
    (whole,) = infer.generate(tiny, [[1, 5, 9]], asked)
    batch = generation.Decoding(tiny, [[1, 5, 9]], asked)
    while batch.alive:
        batch.step(steps)
    same(batch.rows[0].completion, whole)


def test_chunks_of_another_size(tiny: Pangu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(HOT, max_new_tokens=40)
    (whole,) = infer.generate(tiny, [[1, 5, 9]], asked)
    monkeypatch.setattr(decode, "CHUNK", 6)
    decode.decode.clear_cache()
    same(infer.generate(tiny, [[1, 5, 9]], asked)[0], whole)
    decode.decode.clear_cache()


def test_unseeded_prompts_and_completions_all_differ(tiny: Pangu) -> None:
    asked = Sampling(max_new_tokens=20, temperature=1.0, n=2, ignore_eos=True)
    got = infer.generate(tiny, [[1, 5, 9]] * 2, asked) + infer.generate(tiny, [[1, 5, 9]], asked)
    assert len({tuple(each.token_ids) for each in got}) == 6


def test_settings_are_data(tiny: Pangu) -> None:
    """Penalties and biases add one program, top-logprobs another; their values none."""
    decode.decode.clear_cache()

    def programs(**changes: Any) -> int:
        base = Sampling(max_new_tokens=10, seed=1, ignore_eos=True)
        infer.generate(tiny, [[1, 5, 9]], dataclasses.replace(base, **changes))
        return decode.decode._cache_size()

    one = programs()
    assert programs(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, seed=None) == one
    assert programs(stop_token_ids=(3, 4, 5), ignore_eos=False) == one
    assert programs(presence_penalty=1.0) == 2 * one
    assert programs(logit_bias={3: 1.0, 4: 2.0}, temperature=0.3) == 2 * one
    assert programs(repetition_penalty=1.3, frequency_penalty=-1.0) == 2 * one
    assert programs(top_logprobs=4) == 3 * one
    assert programs(top_logprobs=3) == 3 * one
    assert programs(presence_penalty=1.0, top_logprobs=4) == 4 * one


def test_samplings_must_fit_prompts_and_model(tiny: Pangu) -> None:
    with pytest.raises(InputError, match="1 samplings for 2 prompts"):
        infer.generate(tiny, [[1], [2]], [GREEDY])
    for id in (512, -1):
        with pytest.raises(InputError, match=f"logit_bias: token id {id} is outside"):
            infer.generate(tiny, [[1]], Sampling(logit_bias={id: 1.0}))


def test_few_programs_are_compiled(tiny: Pangu) -> None:
    """Prompts and lengths of many sizes share a handful of shapes, and calls of a known shape
    compile nothing.
    """
    prefill, decoding = decode.prefill, decode.decode
    for compiled in (prefill, decoding, decode.grow):
        compiled.clear_cache()
    rng = np.random.default_rng(1)

    def run() -> None:
        for rows, longest, new in ((1, 3, 5), (1, 16, 40), (2, 9, 7), (1, 11, 90), (2, 15, 33)):
            prompts = [rng.integers(0, 512, rng.integers(1, longest + 1)).tolist()] * rows
            infer.generate(tiny, prompts, Sampling(max_new_tokens=new, ignore_eos=True))

    run()
    assert prefill._cache_size() == 2  # one or two rows of up to 16 tokens
    compiled = decoding._cache_size()
    assert compiled <= 5
    for _ in range(3):
        run()
    assert (prefill._cache_size(), decoding._cache_size()) == (2, compiled)
    hot = Sampling(max_new_tokens=40, temperature=0.5, top_k=3, seed=1)
    infer.generate(tiny, [[1, 2, 3]], hot)  # settings are data, not shapes
    assert (prefill._cache_size(), decoding._cache_size()) == (2, compiled)


def test_no_transfer_within_a_chunk(tiny: Pangu) -> None:
    """The decode loop is one program with a while loop: the host is not asked between tokens."""
    batch = generation.Decoding(tiny, [[1, 5, 9]], GREEDY)
    batch.step()
    lowered = decode.decode.lower(tiny, batch._state, batch._request, jnp.int32(4), 0)
    assert "stablehlo.while" in lowered.as_text()
    compiled = lowered.compile().as_text()
    assert "callback" not in compiled
    assert "outfeed" not in compiled


def test_bf16_generates(name: str) -> None:
    model = pangu_jax.load(ORACLE / name, dtype="bfloat16")
    (got,) = infer.generate(model, [[1, 5, 9]], GREEDY)
    assert len(got.token_ids) == 32
    assert jnp.isfinite(jnp.array(got.logprobs)).all()


def test_progress_is_told_the_steps(tiny: Pangu) -> None:
    seen: list[int] = []
    infer.generate(tiny, [[1]], Sampling(max_new_tokens=70, ignore_eos=True), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 1
    assert seen[-1] <= 70


def test_nothing_in_nothing_out(tiny: Pangu) -> None:
    assert infer.generate(tiny, []) == []


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "a prompt is empty"),
        ([512], "token id 512 is outside the vocabulary of 512"),
        ([1, -1], "token id -1 is outside"),
        ([1.5], "must be a list of token ids"),
        ([[1]], "must be a list of token ids"),
        ([1] * 2049, "longer than the model's 2048 positions"),
    ],
)
def test_bad_prompts(tiny: Pangu, prompt: list, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        inputs.check_prompt(tiny.config, prompt)
