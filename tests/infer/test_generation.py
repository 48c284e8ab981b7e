"""Generated tokens: the reference's, whatever the batch, the form, the padding and the chunks."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import pangu_jax
from infer import decode, generation
from infer.sampling import Sampling
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu

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
        generation.check_prompt(tiny.config, prompt)
