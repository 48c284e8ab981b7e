"""The engine gives what `generate` and a full forward pass give, whatever else it is doing."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infer
import pangu_jax
from infer.engine.engine import Engine, Ticket
from infer.engine.runner import Shape
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax.errors import InputError
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer, write_preset
from tests import layouts
from tests.infer import test_layouts as generating

SLOW = pytest.mark.slow

# So few pages that requests push each other out, and so small that all have several.
TIGHT = Shape(slots=3, pages=10, page=4, tile=3, tiles=2, context=40, steps=3)

SHARED = [5, 9, 4, 8, 2, 2, 6, 1, 3]
PROMPTS = [
    [1, *SHARED],
    [1, *SHARED, 7],
    [2, 3],
    [7] * 13,
    [1, *SHARED, 7, 7, 7, 7],
    [4],
    [96, 95, 94],
    [1, *SHARED],
]
SAMPLINGS = [
    *generating.SAMPLINGS,
    Sampling(max_new_tokens=15, ignore_eos=True),
    Sampling(max_new_tokens=1),
    Sampling(max_new_tokens=60, ignore_eos=True),
    Sampling(max_new_tokens=6, stop_token_ids=(3, 4, 5, 20, 30, 31, 32, 33)),
    Sampling(max_new_tokens=10, temperature=1.5, seed=9),
]


def model_of(name: str, form: Any, where: Any = None, cache: Any = None) -> Pangu:
    """Lively weights, the same under every layout."""
    return build.with_cache(generating.model_of(name, form, where), cache)


def answers(engine: Engine) -> list[Completion]:
    asked = zip(PROMPTS, SAMPLINGS, strict=True)
    tickets = [engine.submit(*each) for each in asked]
    return [ticket.result() for each in tickets for ticket in each]


def alike(got: list[Completion], wanted: list[Completion], tolerance: float = 1e-4) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)
        assert [list(x) for x in a.top_logprobs or []] == [list(x) for x in b.top_logprobs or []]


@pytest.mark.parametrize(
    ("name", "form", "where", "cache"),
    [
        ("dense", "separate", None, None),
        ("moge", "stacked", "h2p-8", None),
        pytest.param("moge", "separate", None, None, marks=SLOW),
        pytest.param("tied", "stacked", "tp8", None, marks=SLOW),
        pytest.param("moge", "stacked", "ep8", None, marks=SLOW),
        pytest.param("topk", "separate", "h2p-4x2", None, marks=SLOW),
        pytest.param("dense", "separate", "two axes of heads", None, marks=SLOW),
        pytest.param("moge", "stacked", "another order", None, marks=SLOW),
        pytest.param("dense", "stacked", None, "int8", marks=SLOW),
        pytest.param("moge", "separate", "h2p-8", "int8", marks=SLOW),
    ],
)
def test_the_engine_is_generate(name: str, form: Any, where: Any, cache: Any) -> None:
    """Under every layout, with other requests beside it, prompts in parts and prefixes shared."""
    few = dataclasses.replace(TIGHT, pages=8, context=32, slots=2, tiles=1)
    shape = few if where else TIGHT
    layout = None if where is None else layouts.named(where)
    wanted = infer.generate(model_of(name, form, cache=cache), PROMPTS, SAMPLINGS)
    wanted[-3] = cut(wanted[-3], PROMPTS[5], shape.context)
    model = model_of(name, form, layout, cache)
    with Engine(model, shape) as engine:
        for _ in engine.warm_up() if where else ():
            pass
        compiled = engine.stats.compiled
        for _ in range(2):
            alike(answers(engine), wanted)
        stats = engine.stats
    assert stats.running == stats.waiting == 0
    assert stats.free_pages == shape.pages * model.layout.size(model.layout.of("batch"))
    assert stats.prefix_tokens > 0
    if where is not None:
        assert stats.compiled == compiled
    if where is None:
        assert stats.preemptions > 0


def cut(completion: Completion, prompt: list[int], context: int) -> Completion:
    """As long as an engine has room for."""
    most = context - len(prompt) + 1
    ids, logprobs = completion.token_ids[:most], completion.logprobs[:most]
    return dataclasses.replace(completion, token_ids=ids, logprobs=logprobs)


# --- one engine under random load ---------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Any:
    made = Engine(model_of("dense", "separate"), TIGHT)
    for _ in made.warm_up():
        pass
    with made:
        yield made


@dataclasses.dataclass
class Call:
    prefix: list[int]
    own: list[int]
    tokens: int
    ignore_eos: bool
    priority: int
    seconds: float
    tenant: str
    cancelled: bool


CALLS = st.builds(
    Call,
    prefix=st.sampled_from([[], SHARED, [1, *SHARED, 7, 7, 3], [2] * 17]),
    own=st.lists(st.integers(0, 96), min_size=1, max_size=12),
    tokens=st.integers(1, 30),
    ignore_eos=st.booleans(),
    priority=st.integers(0, 2),
    seconds=st.sampled_from([math.inf, math.inf, math.inf, 0.0, 0.02]),
    tenant=st.sampled_from("ab"),
    cancelled=st.booleans(),
)


# The engine's thread may work while a strategy draws, and beartype there picks which item of a list
# it checks by the global `random`: Hypothesis takes that for the strategy's.
@pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
@settings(max_examples=30)
@given(calls=st.lists(CALLS, min_size=1, max_size=10))
def test_random_traffic(engine: Engine, calls: list[Call]) -> None:
    """Every token is the likeliest of a full pass over what came before; nothing is left behind,
    and nothing is compiled.
    """
    compiled = engine.stats.compiled
    tickets: list[Ticket] = []
    for call in calls:
        options: Any = dict(priority=call.priority, seconds=call.seconds, tenant=call.tenant)
        sampling = Sampling(call.tokens, ignore_eos=call.ignore_eos)
        tickets += engine.submit([*call.prefix, *call.own], sampling, **options)
        if call.cancelled:
            engine.cancel(tickets[len(tickets) // 2])
    for call, ticket in zip(calls, tickets, strict=True):
        completion = ticket.result()
        prompt = [*call.prefix, *call.own]
        is_a_full_pass(engine.model, prompt, completion)
        ends = set() if call.ignore_eos else {11, 12}
        most = min(call.tokens, 40 - len(prompt) + 1)
        match completion.finish_reason:
            case "stop":
                assert completion.token_ids[-1] in ends
            case "length":
                assert len(completion.token_ids) == most
            case "deadline":
                assert call.seconds < math.inf
        assert not ends & set(completion.token_ids[:-1])
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, TIGHT.pages)
    assert stats.compiled == compiled


full = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


def is_a_full_pass(model: Pangu, prompt: list[int], completion: Completion) -> None:
    if not completion.token_ids:
        return
    tokens = np.zeros((1, 41), np.int32)
    whole = [*prompt, *completion.token_ids]
    tokens[0, : len(whole)] = whole
    logprobs = np.asarray(full(model, tokens))[0, len(prompt) - 1 : len(whole) - 1]
    own = logprobs[np.arange(len(completion.token_ids)), completion.token_ids]
    np.testing.assert_allclose(completion.logprobs, own, atol=1e-4)
    assert (logprobs.max(-1) - own).max() < 1e-4


def test_a_thousand_requests_half_of_them_cancelled(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    tickets = []
    for i in range(1000):
        prompt = rng.integers(0, 97, rng.integers(1, 9)).tolist()
        tickets += engine.submit(prompt, Sampling(int(rng.integers(1, 6)), ignore_eos=True))
        if i % 2:
            engine.cancel(tickets[int(rng.integers(max(0, i - 20), i + 1))])
    reasons = [ticket.result().finish_reason for ticket in tickets]
    assert set(reasons) == {"length", "cancelled"}
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, TIGHT.pages)


def test_a_prefix_is_not_computed_twice(engine: Engine) -> None:
    prompt = [17, 18, 19, 20] * 6
    before = engine.stats.prefix_tokens
    first = engine.submit(prompt, tenant="x")[0].result()
    assert engine.stats.prefix_tokens == before
    again = engine.submit(prompt, tenant="x")[0].result()
    assert engine.stats.prefix_tokens == before + 20  # not the last page: its end chooses
    engine.submit(prompt, tenant="y")[0].result()
    assert engine.stats.prefix_tokens == before + 20
    assert first.token_ids == again.token_ids


def test_text_comes_as_it_becomes_certain(tmp_path: Path) -> None:
    write_preset("nano", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    config = dataclasses.replace(
        layouts.DENSE, vocab_size=tokenizer.vocab_size, max_positions=64, eos_token_ids=(15,)
    )
    model = pangu_jax.init(config, jax.random.key(0))
    prompts = [tokenizer.encode(text) for text in ("12+34", "a", "Why is the sky blue?")]
    asked = [
        Sampling(max_new_tokens=20, stop=("e", "1"), seed=2, temperature=1.0),
        Sampling(max_new_tokens=24, thinking_budget=4, logit_bias={4: 5.0}),
        Sampling(max_new_tokens=20, ignore_eos=True),
    ]
    wanted = infer.generate(model, prompts, asked, tokenizer=tokenizer)
    heard: dict[int, list[str]] = {0: [], 1: [], 2: []}
    ends: dict[int, Completion] = {}

    def listener(i: int) -> Any:
        def told(text: str, completion: Completion | None) -> None:
            assert i not in ends
            heard[i].append(text)
            if completion is not None:
                ends[i] = completion

        return told

    shape = Shape(slots=2, pages=40, page=4, tile=8, tiles=2, context=64, steps=4)
    with Engine(model, shape, tokenizer) as engine:
        asks = enumerate(zip(prompts, asked, strict=True))
        tickets = [engine.submit(*each, told=listener(i))[0] for i, each in asks]
        got = [ticket.result() for ticket in tickets]
    alike(got, wanted)
    assert {i: "".join(parts) for i, parts in heard.items()} == dict(
        enumerate(each.text for each in wanted)
    )
    assert len(heard[2]) > 2
    assert [ends[i] for i in range(3)] == got


def test_what_can_never_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(
        InputError, match=r"41 tokens .* room for 40 .*10 pages of 4.* 64 positions"
    ):
        engine.submit([1] * 41)
    with pytest.raises(InputError, match=r"71 stop token ids, .* at most 64 may be"):
        engine.submit([1], Sampling(stop_token_ids=tuple(range(20, 89))))
    with pytest.raises(InputError, match="outside the vocabulary"):
        engine.submit([97])
    with pytest.raises(InputError, match="needs a tokenizer"):
        engine.submit([1], Sampling(stop=("x",)))
    assert len(engine.submit([1] * 40, Sampling(ignore_eos=True))[0].result().token_ids) == 1


@pytest.mark.parametrize(
    ("manner", "complaint"),
    [
        (dict(tenant="\ud800"), "tenant must be printable text"),
        (dict(tenant=["x"]), "tenant must be printable text"),
        (dict(priority=None), "priority must be an integer"),
        (dict(priority=True), "priority must be an integer"),
        (dict(seconds=math.nan), "seconds must be a number"),
    ],
)
def test_bad_manners_are_refused_and_stop_nobody(
    engine: Engine, manner: dict, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        call_unchecked(engine, manner)
    assert engine.submit([1], Sampling(1))[0].result().finish_reason in ("length", "stop")


def call_unchecked(engine: Engine, manner: dict) -> None:
    """As a server does, whose arguments come from outside: no type checker has seen them."""
    getattr(Engine.submit, "__wrapped__", Engine.submit)(engine, [1], **manner)


def test_closing_gives_up_what_is_not_done() -> None:
    engine = Engine(model_of("dense", "separate"), TIGHT)
    with engine:
        tickets = [engine.submit([1, 2], Sampling(30, ignore_eos=True))[0] for _ in range(9)]
    reasons = {ticket.result().finish_reason for ticket in tickets}
    assert "cancelled" in reasons
    assert reasons <= {"cancelled", "length"}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1])


def test_closing_what_was_never_started() -> None:
    engine = Engine(model_of("dense", "separate"), TIGHT)
    (ticket,) = engine.submit([1])
    engine.close()
    assert ticket.result().finish_reason == "cancelled"


def test_a_failure_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_of("dense", "separate"), TIGHT)

    def fail(batch: Any) -> Any:
        raise ValueError("the device is gone")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    engine.start()
    (ticket,) = engine.submit([1])
    with pytest.raises(RuntimeError, match="the engine stopped") as caught:
        ticket.result()
    assert "the device is gone" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="the engine stopped"):
        engine.submit([1])
    engine.close()


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moge"])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_deterministic_bits(name: str, cache: Any, optimised: None) -> None:
    """Alone, in a crowd, after a prefix that was there, pushed out and back: one answer, to the
    last bit.
    """
    model = build.with_cache(pangu_jax.init(WIDER[name], jax.random.key(0)), cache)
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 97, 20).tolist()
    prompts = [
        shared[: rng.integers(1, 20)] + rng.integers(0, 97, rng.integers(1, 9)).tolist()
        for _ in range(10)
    ]
    sampling = Sampling(max_new_tokens=20, ignore_eos=True)
    shape = dataclasses.replace(TIGHT, pages=14, context=56, deterministic=True)
    with Engine(model, shape) as engine:
        alone = [engine.submit(prompt, sampling)[0].result() for prompt in prompts]
        for _ in range(2):
            tickets = [engine.submit(prompt, sampling)[0] for prompt in prompts]
            crowd = [ticket.result() for ticket in tickets]
            assert [c.logprobs for c in crowd] == [c.logprobs for c in alone]
            assert [c.token_ids for c in crowd] == [c.token_ids for c in alone]
        assert engine.stats.preemptions > 0
        assert engine.stats.prefix_tokens > 0


WIDER = {
    name: dataclasses.replace(config, hidden_size=64, num_layers=2, head_dim=16, num_heads=4)
    for name, config in layouts.MODELS.items()
}
