"""Generation on eight devices gives the tokens of one, whatever was asked."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import infer
import pangu_jax
from infer import __main__ as door
from infer.output import Completion
from infer.sampling import Sampling
from pangu_jax import build
from pangu_jax.model import Pangu
from pangu_jax.text.tokenizer import Tokenizer, write_preset
from tests import folders, layouts

# Three requests, four rows: no number of replicas here divides them. The cache must grow.
PROMPTS = [[1, 5, 9, 4, 8], [2, 3], [7, 7, 7, 7, 7, 7, 7, 7, 7, 2, 4]]
SAMPLINGS = [
    Sampling(
        max_new_tokens=7,
        ignore_eos=True,
        n=2,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        seed=3,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        top_logprobs=2,
    ),
    Sampling(max_new_tokens=9, ignore_eos=True, logit_bias={4: 1.0}, top_logprobs=1),
    Sampling(max_new_tokens=8, min_p=0.02, temperature=1.0, seed=1),
]


def model_of(name: str, form: Any, where: Any = None) -> Pangu:
    """Lively weights, the same under every layout."""
    config = dataclasses.replace(layouts.MODELS[name], eos_token_ids=(11, 12))
    like = layouts.abstract(config, where, form)
    return build.with_weights(like, jax.device_put(numbers(name, form), build.places(like)))


@functools.cache
def numbers(name: str, form: Any) -> dict[str, np.ndarray]:
    return layouts.lively(layouts.init(layouts.MODELS[name], form=form))


@functools.cache
def wanted(name: str, form: Any) -> list[Completion]:
    """One device's."""
    return infer.generate(model_of(name, form), PROMPTS, SAMPLINGS)


def same(got: list[Completion], one: list[Completion]) -> None:
    assert [each.token_ids for each in got] == [each.token_ids for each in one]
    assert [each.finish_reason for each in got] == [each.finish_reason for each in one]
    for a, b in zip(got, one, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert (a.top_logprobs is None) == (b.top_logprobs is None)
        for these, those in zip(a.top_logprobs or (), b.top_logprobs or (), strict=True):
            assert list(these) == list(those)
            np.testing.assert_allclose(list(these.values()), list(those.values()), atol=1e-4)


FAST = {("dense", "tp8", "flashcomm1", "separate"), ("moge", "h2p-8", "flashcomm1", "stacked")}


def cases() -> list[Any]:
    """The product: all but FAST are slow."""
    every = [
        (m, w, k, f)
        for m in ("dense", "moge", "topk")
        for w in (*layouts.NAMES, *layouts.ODD)
        for k in ("flashcomm1", "all_reduce")
        for f in ("separate", "stacked")
        if m == "moge" or f == "separate"
    ]
    assert set(every) >= FAST
    return [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case))
        for case in every
    ]


@pytest.mark.parametrize(("name", "where", "kind", "form"), cases())
def test_the_tokens_of_one_device(name: str, where: str, kind: str, form: str) -> None:
    model = model_of(name, form, layouts.named(where, kind))
    same(infer.generate(model, PROMPTS, SAMPLINGS), wanted(name, form))


def test_fewer_rows_than_replicas() -> None:
    model = model_of("moge", "stacked", layouts.named("ep8"))
    alone = infer.generate(model, PROMPTS[:1], SAMPLINGS[:1])
    same(alone, wanted("moge", "stacked")[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoGE model with the nano tokenizer."""
    path = tmp_path_factory.mktemp("folder")
    raw = {**folders.MOGE, "vocab_size": 1024, "eos_token_id": 15, "num_hidden_layers": 1}
    folders.write(path, raw)
    write_preset("nano", path)
    return path


@pytest.mark.slow
def test_a_nano_moge_with_strings_that_end_and_thoughts_cut_short(folder: Path) -> None:
    """The preset of that name, with random weights and one layer."""
    words = Tokenizer.load(folder)
    config = dataclasses.replace(pangu_jax.preset("nano-moge"), num_layers=1)
    one, many = (
        pangu_jax.init(config, jax.random.key(2), where=where, form="separate")
        for where in (None, "h2p-8")
    )
    thinking = [*words.encode("Hello"), words.id("[unused16]")]
    prompts = [words.encode("one"), thinking, words.encode("two three")]
    greedy = Sampling(12, ignore_eos=True)
    cut = dataclasses.replace(greedy, thinking_budget=5)
    free = infer.generate(one, prompts, [greedy, cut, greedy], tokenizer=words)
    assert words.id("[unused17]") in free[1].token_ids
    samplings = [dataclasses.replace(greedy, stop=((free[0].text or "")[4:7],)), cut, greedy]
    wanted = infer.generate(one, prompts, samplings, tokenizer=words)
    assert wanted[0].finish_reason == "stop"
    assert len(wanted[0].token_ids) < 12
    got = infer.generate(many, prompts, samplings, tokenizer=words)
    same(got, wanted)
    assert [each.text for each in got] == [each.text for each in wanted]


# --- the command line


@pytest.fixture
def command(folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pangu-infer generate` on the folder, with more flags: its exit code, stdout and stderr."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, "") or "0.95")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

    def run(*flags: str) -> tuple[int, str, str]:
        if "--max-new-tokens" not in flags:
            flags = (*flags, "--max-new-tokens", "6")
        argv = ["generate", "--model", str(folder), "--ignore-eos", "--json", *flags]
        code = door.main(argv)
        return code, *capsys.readouterr()

    return run


def completions(found: tuple[int, str, str]) -> list[dict[str, Any]]:
    code, out, err = found
    assert code == 0, err
    return json.loads(out)["completions"]


def test_the_command_line_takes_a_layout(command) -> None:
    flags = ("--prompt-ids", "1,5,9", "--temperature", "0.7", "--seed", "3")
    one, many = (completions(command(*flags, *more)) for more in ((), ("--layout", "h2p-8")))
    assert one[0]["token_ids"] == many[0]["token_ids"]
    assert len(one[0]["token_ids"]) == 6


@pytest.mark.slow
def test_voted_experts_on_the_command_line(command) -> None:
    """The vote counts the tokens of all devices, and is lossy."""
    flags = ("--prompt-ids", "1,5,9,200,300,400,500,600", "--top-logprobs", "5")
    flags += ("--max-new-tokens", "1", "--n", "2", "--temperature", "1", "--seed", "1")
    exact, one, many = (
        [line for each in completions(command(*flags, *more)) for line in each["top_logprobs"]]
        for more in ((), ("--voted-experts", "1"), ("--voted-experts", "1", "--layout", "h2p-8"))
    )
    for line, own in zip(many, one, strict=True):
        assert line.keys() == own.keys()
        assert list(line.values()) == pytest.approx(list(own.values()), abs=1e-4)
    assert one != exact


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--layout", "tp8"), "attention.heads (y: 8 ranks) cannot split 4 query"),
        (("--layout", "tp9"), "no layouts configuration named 'tp9'"),
        (("--layout", "ep8"), "experts.expert (y: 8 ranks) cannot hold 4 whole groups"),
        (("--layout", "h2p-8", "--voted-experts", "9"), "voted_experts must be from per_group"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(command, flags, complaint) -> None:
    code, out, err = command("--prompt-ids", "1,5,9", *flags)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert complaint in line
