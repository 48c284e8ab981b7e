"""A run's configuration: to TOML and back, from the command line, and refused in one line."""

import dataclasses
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pangu_jax
from infer import cli
from pangu_jax.config import configs_folder
from pangu_jax.errors import ConfigError, InputError
from train import __main__ as door
from train import commands, config
from train.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    Phase,
    RunSection,
    Source,
    Stage,
    StepSection,
)

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((configs_folder() / "train").glob("*.toml"))

LEAST = """
[model]
preset = "nano"
tokenizer = "nano"
[data]
path = "data.jsonl"
[run]
output = "runs/a"
steps = 200
"""

given_files = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
) | st.sampled_from(
    [
        '"',
        "'",
        '"""',
        "\\",
        "a\nb",
        "\r\n",
        "\t\x1b\x7f\x85",
        "模型 😀",
        "\u2028",
        "# x = 1",
        "]",
        "",
    ]
)


def numbers(low: float, high: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **bounds)


def whole(low: int, high: int = 2**70) -> st.SearchStrategy[int]:
    return st.integers(low, 1000) | st.integers(low, high)


def table_of(
    optional: dict[str, st.SearchStrategy[Any]] | None = None, **fields: st.SearchStrategy[Any]
) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields, optional=optional or {})


def with_steps_to_warm_up(table: dict[str, Any]) -> dict[str, Any]:
    table["optimizer"]["warmup_steps"] %= table["run"]["steps"] + 1
    return table


def one_of(*words: str) -> st.SearchStrategy[str]:
    return st.sampled_from(words)


MOST = 2**24
rates = numbers(0, 1e30, exclude_min=True)

# As in a file, and not the dataclasses: run-time type checks draw random numbers of their own.
# Left out is only what then has no value.
tables = table_of(
    model=table_of({"layout": texts}, preset=texts, tokenizer=texts)
    | table_of({"layout": texts}, path=texts),
    data=table_of(
        path=texts,
        length=whole(2),
        batch=whole(1),
        packing=one_of("knapsack", "first-fit"),
        learn=one_of("assistants", "last", "all"),
        bad=one_of("stop", "skip"),
    ),
    run=table_of(
        {"spike": numbers(1, 1e300, exclude_min=True)},
        output=texts,
        steps=whole(1, MOST),
        save_every=whole(1, MOST),
        keep=whole(1, 10_000),
        seed=whole(0, 2**31 - 1),
        failure=one_of("stop", "skip"),
        tensorboard=st.booleans(),
    ),
    step=table_of(
        {"remat": one_of("dots", "full")},
        compute=one_of("float32", "bfloat16"),
        accumulate=st.just(1),  # more than the rows of a batch is refused
        z_loss=numbers(0, 1e6),
        balance=numbers(0, 1e6),
    ),
    optimizer=table_of(
        {"ema": numbers(0, 1, exclude_min=True, exclude_max=True)},
        name=one_of("adamw", "muon"),
        learning_rate=rates,
        final_fraction=numbers(0, 1),
        warmup_steps=whole(0, MOST),
        beta1=numbers(0, 1, exclude_max=True),
        beta2=numbers(0, 1, exclude_max=True),
        weight_decay=numbers(0, 1e300),
        clip_norm=numbers(0, 1e30, exclude_min=True),
        freeze=st.lists(texts, max_size=3),
    ),
    lora=table_of(alpha=numbers(0, 1e6, exclude_min=True), targets=st.just([])),
).map(with_steps_to_warm_up)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
# Parts of a mixture: none is more than 10,000 times another, but for those that are left out.
reals = numbers(1, 10_000) | st.just(0.0)
amounts = reals | st.integers(1, 10_000) | st.just(0)


@st.composite
def rich_tables(draw: st.DrawFn) -> dict[str, Any]:
    """With several files, phases, and adapters where they may be."""
    table = draw(tables)
    some = table_of(path=texts, weight=reals)
    table["source"] = [
        {"name": name, **draw(some)} for name in draw(st.lists(names, max_size=3, unique=True))
    ]
    known = [source["name"] for source in table["source"]] or ["data"]
    if table["source"]:
        table["source"][0]["weight"] = draw(numbers(1, 10_000))
        del table["data"]["path"]
    more = {
        "learning_rate": rates,
        "last_learning_rate": rates,
        "length": whole(2),
        "batch": whole(1),
        "weights": st.dictionaries(st.sampled_from(known), amounts, min_size=1).filter(
            lambda weights: any(weights.values())
        ),
    }
    table["phase"] = draw(st.lists(table_of(more, steps=st.integers(1, 10**6)), max_size=3))
    if table["phase"]:
        table["run"]["steps"] = sum(phase["steps"] for phase in table["phase"])
        table["optimizer"]["warmup_steps"] %= table["phase"][0]["steps"] + 1
    if "path" in table["model"] and draw(st.booleans()):
        table["optimizer"]["freeze"] = []
        table["lora"] |= {"rank": draw(whole(1, 4096)), "targets": draw(st.lists(texts))}
        table["lora"] |= draw(table_of({"base": one_of("w8a16", "w8a8", "w4a16", "fp8")}))
    return table


KINDS = {
    "model": ModelSection,
    "data": DataSection,
    "run": RunSection,
    "step": StepSection,
    "optimizer": OptimizerSection,
    "lora": LoraSection,
}
LISTS = {"source": Source, "phase": Phase}

# What may be another when a run goes on.
FREE = {
    "model.layout",
    "run.failure",
    "run.keep",
    "run.output",
    "run.save_every",
    "run.spike",
    "run.tensorboard",
    "step.remat",
}


def made(table: dict[str, Any]) -> Config:
    values: dict[str, Any] = {}
    for section, held in table.items():
        if section in LISTS:
            values[section] = tuple(LISTS[section](**each) for each in held)
        else:
            held = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
            values[section] = KINDS[section](**held)
    return Config(**values)


def fields(of: Config) -> dict[tuple[str, str], Any]:
    """Every value by section and name."""
    found = {}
    for section, kind in KINDS.items():
        for field in dataclasses.fields(kind):
            found[section, field.name] = getattr(getattr(of, section), field.name)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(LEAST)
    return tmp_path / "run.toml"


def toml(table: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        line
        for section, values in table.items()
        for line in (f"[{section}]", *(f"{k} = {v!r}" for k, v in values.items()))
    )


def refused(name: Path | str, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(str(name), overrides or {})
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- TOML


@given(rich_tables())
@settings(given_files, max_examples=50)
def test_to_toml_and_back(file: Path, table: dict[str, Any]) -> None:
    text = config.to_toml(made(table))
    file.write_text(text, encoding="utf-8")
    assert config.load(str(file), {}) == made(table)
    # What another reader of TOML finds: everything that has a value.
    found = tomllib.loads(text)
    assert found == {section: held for section, held in table.items() if held != []}
    for section in KINDS:
        assert {k: type(v) for k, v in found[section].items()} == {
            k: type(v) for k, v in table[section].items()
        }


def test_defaults_are_spelt_out(file: Path) -> None:
    """But for those that are no value, and lists of tables that are empty."""
    assert tomllib.loads(config.to_toml(config.load(str(file), {}))) == {
        "model": {"preset": "nano", "tokenizer": "nano"},
        "data": {
            "path": "data.jsonl",
            "length": 1024,
            "batch": 8,
            "packing": "knapsack",
            "learn": "assistants",
            "bad": "stop",
        },
        "run": {
            "output": "runs/a",
            "steps": 200,
            "save_every": 500,
            "keep": 2,
            "seed": 0,
            "failure": "stop",
            "tensorboard": False,
        },
        "step": {"compute": "float32", "accumulate": 1, "z_loss": 0.0, "balance": 0.0},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "final_fraction": 0.1,
            "warmup_steps": 100,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "freeze": [],
        },
        "lora": {"alpha": 16.0, "targets": []},
    }


def test_whole_numbers_are_numbers(file: Path) -> None:
    file.write_text(LEAST + "[optimizer]\nlearning_rate = 1\nbeta1 = 0\n")
    found = config.load(str(file), {}).optimizer
    assert (found.learning_rate, found.beta1) == (1.0, 0.0)
    assert isinstance(found.learning_rate, float)


# --- mistakes in a file


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "missing model, data, run"),
        ("[modle]\n", "unknown key 'modle'; did you mean model?"),
        (LEAST + "[optimiser]\n", "unknown key 'optimiser'; did you mean optimizer?"),
        (LEAST + "stesp = 5\n", "run: unknown key 'stesp'; did you mean steps?"),
        (LEAST + "[optimizer]\nlearning-rate = 1.0\n", "did you mean learning_rate?"),
        (LEAST + "xyzzy = 5\n", "run: unknown key 'xyzzy'"),
        (LEAST + "[optimizer]\nbeta1 = '0.9'\n", "beta1 must be a number"),
        (LEAST + "[optimizer]\nfreeze = 'norm'\n", "freeze must be a list"),
        (LEAST + "[optimizer]\nfreeze = ['a', 5]\n", "freeze[1] must be a string"),
        (LEAST + "[optimizer]\nlearning_rate = nan\n", "must be a finite number"),
        (LEAST + "[optimizer]\nclip_norm = inf\n", "must be a finite number"),
        (LEAST + f"[optimizer]\nclip_norm = 1{'0' * 400}\n", "must be a finite number"),
        (LEAST + "save_every = 2.0\n", "save_every must be an integer"),
        (LEAST + "seed = true\n", "seed must be an integer"),
        (LEAST + "seed = '1'\n", "seed must be an integer"),
        (LEAST.replace('"data.jsonl"', "5"), "path must be a string"),
        (LEAST.replace("steps = 200", ""), "run: missing steps"),
        (LEAST.replace("[run]", "[data.run]"), "data: unknown key 'run'"),
        ("run = 5\n" + LEAST, "not valid TOML"),
        ("run = 5\n", "run must be a table, not 5"),
        ("[[run]]\nsteps = 5\n", "run must be a table"),
        (LEAST + "steps = 5\n", "not valid TOML"),
        ("{", "not valid TOML"),
        ("a = " + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_file_is_one_line(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    message = refused(file)
    assert message.startswith(f"{file}: ")
    assert complaint in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.toml")
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[run]\noutput = '\xff'\n")
    assert "not UTF-8" in refused(tmp_path / "latin.toml")
    for name in ("nnao", "", "a\nb", "\x1b[31m"):
        assert "known: nano" in refused(name)


BAD = {
    ("data", "length"): (1, 0, -5),
    ("data", "batch"): (0, -1),
    ("run", "steps"): (0, -1, 2**24 + 1, 2**70),
    ("run", "save_every"): (0, -1, 2**24 + 1),
    ("run", "keep"): (0, 10_001),
    ("run", "seed"): (-1, 2**31),
    ("run", "spike"): (1.0, 0.0, -2.0, math.inf, math.nan),
    ("run", "failure"): ("go on", ""),
    ("data", "packing"): ("best-fit",),
    ("data", "learn"): ("assistant",),
    ("data", "bad"): ("Skip",),
    ("step", "compute"): ("float16", "bf16"),
    ("step", "remat"): ("some", "None"),
    ("step", "accumulate"): (0, 2**16 + 1),
    ("step", "z_loss"): (-1e-9, 1.1e6, math.nan),
    ("step", "balance"): (-1e-9, 1.1e6, math.inf),
    ("lora", "rank"): (0, 4097),
    ("lora", "alpha"): (0.0, 1.1e6),
    ("lora", "base"): ("w2a16",),
    ("optimizer", "name"): ("adam", "Muon"),
    ("optimizer", "ema"): (0.0, 1.0, -0.5, math.nan),
    ("optimizer", "learning_rate"): (0.0, -1e-9, 1.1e30, math.inf, math.nan),
    ("optimizer", "final_fraction"): (-1e-9, 1.0001, math.nan),
    ("optimizer", "warmup_steps"): (-1, 201),
    ("optimizer", "beta1"): (-1e-9, 1.0, 2.0, math.nan),
    ("optimizer", "beta2"): (-1e-9, 1.0, 2.0, math.nan),
    ("optimizer", "weight_decay"): (-1e-9, math.inf),
    ("optimizer", "clip_norm"): (0.0, -1.0, math.inf),
}
GOOD = {
    ("data", "length"): (2,),
    ("data", "batch"): (1,),
    ("run", "steps"): (100, 2**24),
    ("run", "save_every"): (1, 2**24),
    ("run", "keep"): (1, 10_000),
    ("run", "seed"): (0, 2**31 - 1),
    ("run", "spike"): (1.0001,),
    ("step", "accumulate"): (1, 8),
    ("step", "z_loss"): (0.0, 1e6),
    ("step", "balance"): (0.0, 1e6),
    ("optimizer", "ema"): (1e-9, 0.9999),
    ("lora", "alpha"): (1e-9, 1e6),
    ("optimizer", "learning_rate"): (1e-300,),
    ("optimizer", "final_fraction"): (0.0, 1.0),
    ("optimizer", "warmup_steps"): (0, 200),
    ("optimizer", "beta1"): (0.0, 0.999999),
    ("optimizer", "beta2"): (0.0, 0.999999),
    ("optimizer", "weight_decay"): (0.0, 1e9),
    ("optimizer", "clip_norm"): (1e-300, 1e9),
}


@pytest.mark.parametrize(("place", "value"), [(p, v) for p, vs in BAD.items() for v in vs])
def test_every_bound(file: Path, place: tuple[str, str], value: Any) -> None:
    section, name = place
    message = refused(file, {section: {name: value}})
    assert message.startswith(f"{file} and the command line: ")
    assert name in message
    table = tomllib.loads(LEAST)
    table.setdefault(section, {})[name] = value
    file.write_text(toml(table))
    assert refused(file) == message.replace(" and the command line", "")


@pytest.mark.parametrize(("place", "value"), [(p, v) for p, vs in GOOD.items() for v in vs])
def test_what_stands_at_a_bound(file: Path, place: tuple[str, str], value: Any) -> None:
    section, name = place
    found = config.load(str(file), {section: {name: value}})
    assert fields(found)[place] == value


MIX = LEAST.replace('[data]\npath = "data.jsonl"\n', "").replace("200", "30")
MIX += """
[optimizer]
warmup_steps = 10
[[source]]
name = "web"
path = "web.jsonl"
[[source]]
name = "code"
path = "code.jsonl"
weight = 3
[[phase]]
steps = 20
[[phase]]
steps = 10
"""
SECOND = "steps = 10\n"  # of the last phase


@pytest.fixture
def mix(file: Path) -> Path:
    file.write_text(MIX.replace("[[source]]", "[data]\n[[source]]", 1))
    return file


def test_files_and_phases(mix: Path) -> None:
    found = config.load(str(mix), {})
    assert found.sources == (Source("web", "web.jsonl"), Source("code", "code.jsonl", 3.0))
    assert found.phase == (Phase(20), Phase(10))
    both = {"web": 1.0, "code": 3.0}
    assert found.stages == (
        Stage(0, 20, 1e-3, 1e-4, 1024, 8, both),
        Stage(20, 30, 1e-3, 1e-4, 1024, 8, both),
    )


def test_a_phase_has_settings_of_its_own(mix: Path) -> None:
    more = 'length = 4096\nbatch = 2\nlearning_rate = 1e-5\nweights = {code = 1, "web" = 0.0}\n'
    mix.write_text(mix.read_text() + more)
    last = config.load(str(mix), {"optimizer": {"final_fraction": 0.5}}).stages[-1]
    assert last == Stage(20, 30, 1e-5, 0.5e-5, 4096, 2, {"code": 1.0, "web": 0.0})
    assert [type(weight) for weight in last.weights.values()] == [float, float]
    mix.write_text(mix.read_text() + "last_learning_rate = 3e-7\n")
    assert config.load(str(mix), {}).stages[-1].last_learning_rate == 3e-7


def test_the_smallest_weight_beside_the_largest(mix: Path) -> None:
    more = "weights = {web = 10_000, code = 1}\n"
    more += "[[phase]]\nsteps = 1\nweights = {web = 0, code = 1e-9}\n"
    mix.write_text(mix.read_text().replace("steps = 30", "steps = 31") + more)
    weights = [stage.weights for stage in config.load(str(mix), {}).stages[1:]]
    assert weights == [{"web": 10_000.0, "code": 1.0}, {"web": 0.0, "code": 1e-9}]


def test_a_run_without_phases_is_one(file: Path) -> None:
    found = config.load(str(file), {"data": {"length": 64, "batch": 3}})
    assert found.sources == (Source("data", "data.jsonl"),)
    assert found.stages == (Stage(0, 200, 1e-3, 1e-4, 64, 3, {"data": 1.0}),)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"web.jsonl"', "5", "source[0]: path must be a string, not 5"),
        ('name = "web"\n', "", "source[0]: missing name"),
        ('"web"', '"a b"', "source[0]: name must be letters, digits, '.', '_' and '-', not 'a b'"),
        ('"web"', '""', "source[0]: name must be letters"),
        ('"web"', '"../web"', "source[0]: name must be letters"),
        ('"web"', f'"{"x" * 65}"', "source[0]: name must be letters"),
        ('"web"', '"a\\nb"', "not 'a\\x0ab'"),
        ('"web"', '"code"', "two [[source]] have the same name"),
        ("weight = 3", "weight = -1", "source[1]: weight must be from 0 to 1e9, not -1.0"),
        ("weight = 3", "weight = 2e9", "source[1]: weight must be from 0 to 1e9"),
        ("weight = 3", "weight = 10001", "largest weight is more than 10,000 times the smallest"),
        (SECOND, SECOND + "weights = {web = 1e-5, code = 1}", "phase 2: the largest weight is"),
        ("weight = 3", "weight = nan", "source[1]: weight must be a finite number"),
        ("weight = 3", "wieght = 3", "unknown key 'wieght'; did you mean weight?"),
        ("[data]", '[data]\npath = "x"', "give either data.path or a [[source]] for each"),
        ("[data]\n", "[data]\nlength = 1\n", "length must be at least 2, not 1"),
        (SECOND, "steps = 0", "phase[1]: steps must be from 1 to 16777216, not 0"),
        (SECOND, "steps = 9", "the phases have 29 steps, but run.steps is 30"),
        (SECOND, "", "phase[1]: missing steps"),
        (SECOND, SECOND + "length = 1", "phase[1]: length must be at least 2, not 1"),
        (SECOND, SECOND + "batch = 0", "phase[1]: batch must be at least 1, not 0"),
        (SECOND, SECOND + "learning_rate = 0", "phase[1]: learning_rate must be above 0"),
        (SECOND, SECOND + "last_learning_rate = 1e31", "last_learning_rate must be above 0, and a"),
        (SECOND, SECOND + "warmup_steps = 3", "phase[1]: unknown key 'warmup_steps'"),
        (SECOND, SECOND + "weights = [1]", "phase[1]: weights must be an object, not [1]"),
        (SECOND, SECOND + "weights = {}", "phase 2: all weights are 0"),
        (SECOND, SECOND + "weights = {web = 0}", "phase 2: all weights are 0"),
        (SECOND, SECOND + "weights = {web = -1}", "weights.web must be from 0 to 1e9, not -1.0"),
        (SECOND, SECOND + "weights = {web = '1'}", 'weights.web must be a number, not "1"'),
        (SECOND, SECOND + "weights = {web = true}", "weights.web must be a number, not true"),
        (SECOND, SECOND + 'weights = {"a\\nb" = "1"}', "weights.a\\x0ab must be a number"),
        (SECOND, SECOND + 'weights = {"a\\nb" = -1}', "weights.a\\x0ab must be from 0 to 1e9"),
        (SECOND, SECOND + 'weights = {"a\\nb" = 1}', "phase 2: no [[source]] is called 'a\\x0ab'"),
        (SECOND, SECOND + "weights = {wbe = 1}", "is called 'wbe'; did you mean web?"),
        ("warmup_steps = 10", "warmup_steps = 21", "(21) are more than the first phase (20)"),
        ("[[phase]]", "[phase]", "not valid TOML"),
    ],
)
def test_bad_files_and_phases_are_one_line(mix: Path, old: str, new: str, complaint: str) -> None:
    mix.write_text(instead(mix.read_text(), old, new))
    message = refused(mix)
    assert message.startswith(f"{mix}: ")
    assert complaint in message


def instead(text: str, old: str, new: str) -> str:
    """The text with something else for the last `old`."""
    before, found, after = text.rpartition(old)
    assert found
    return before + new + after


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("source = 5\n" + LEAST, "source must be a list, not 5"),
        ("phase = [1]\n" + LEAST, "phase[0] must be a table, not 1"),
        (LEAST + "[source]\nname = 'a'\n", 'source must be a list, not {"name": "a"}'),
        (LEAST + "[[phase]]\n[phase.steps]\n", "phase[0]: steps must be an integer, not {}"),
    ],
)
def test_lists_of_tables_are_such(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    assert refused(file) == f"{file}: {complaint}"


def test_a_file_on_the_command_line_is_not_beside_others(mix: Path) -> None:
    assert "give either data.path or a [[source]]" in refused(mix, {"data": {"path": "x"}})


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"rank": 8}, "lora.rank needs a model.path"),
        ({"targets": ("mlp.*",)}, "lora: targets and base need a rank"),
        ({"base": "fp8"}, "lora: targets and base need a rank"),
    ],
)
def test_adapters_need_what_they_stand_beside(
    file: Path, overrides: dict[str, Any], complaint: str
) -> None:
    assert complaint in refused(file, {"lora": overrides})
    trained = {"model": {"path": "folder"}, "lora": {"rank": 8}}
    assert config.load(str(file), trained).lora.scale == 2.0
    frozen = {**trained, "optimizer": {"freeze": ("embed",)}}
    assert "optimizer.freeze: with lora.rank" in refused(file, frozen)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({}, "give either preset or path"),
        ({"preset": "nano", "path": "x"}, "give either preset or path"),
        ({"preset": "nano", "path": "x", "tokenizer": "nano"}, "give either preset or path"),
        ({"preset": "nano"}, "needs a tokenizer"),
        ({"path": "x", "tokenizer": "nano"}, "brings its own"),
        ({"tokenizer": "nano"}, "give either preset or path"),
    ],
)
def test_what_training_begins_with_is_one_thing(
    file: Path, model: dict[str, str], complaint: str
) -> None:
    file.write_text(LEAST.replace('preset = "nano"\ntokenizer = "nano"\n', ""))
    assert complaint in refused(file, {"model": model})
    assert config.load(str(file), {"model": {"path": "x"}}).model == ModelSection(path="x")


# --- overrides


@given(tables, tables, st.data())
@given_files
def test_overrides_win_and_the_rest_stays(
    file: Path, written: dict[str, Any], other: dict[str, Any], data: st.DataObject
) -> None:
    # Of a model of another kind, all or nothing.
    kinds_differ = ("path" in written["model"]) != ("path" in other["model"])
    places = [
        (s, n)
        for s in written
        for n in other[s]
        if s != "model" or n == "layout" or not kinds_differ
    ]
    chosen = set(data.draw(st.lists(st.sampled_from(sorted(places)))))
    expected = {section: dict(values) for section, values in written.items()}
    if kinds_differ and data.draw(st.booleans()):
        chosen |= {("model", name) for name in other["model"]}
        expected["model"] = {n: v for n, v in written["model"].items() if n == "layout"}
    overrides: dict[str, dict[str, Any]] = {}
    for section, name in chosen:
        overrides.setdefault(section, {})[name] = other[section][name]
        expected[section][name] = other[section][name]
    assume(expected["optimizer"]["warmup_steps"] <= expected["run"]["steps"])
    file.write_text(config.to_toml(made(written)), encoding="utf-8")
    assert config.load(str(file), overrides) == made(expected)


PRESET, FOLDER = {"preset": "nano", "tokenizer": "nano"}, {"path": "folder"}


@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        (PRESET, {"path": "x"}, {"path": "x"}),
        (PRESET, {"preset": "x"}, {"preset": "x", "tokenizer": "nano"}),
        (PRESET, {"tokenizer": "x"}, {"preset": "nano", "tokenizer": "x"}),
        (PRESET, {"path": "x", "tokenizer": "y"}, "a folder brings its own"),
        (PRESET, {"path": "x", "preset": "y"}, "give either preset or path"),
        (PRESET, {"path": "x", **PRESET}, "give either preset or path"),
        (FOLDER, {"path": "x"}, {"path": "x"}),
        (FOLDER, {"preset": "x"}, "a preset needs a tokenizer"),
        (FOLDER, {"preset": "x", "tokenizer": "y"}, {"preset": "x", "tokenizer": "y"}),
        (FOLDER, {"tokenizer": "x"}, "a folder brings its own"),
        ({**PRESET, **FOLDER}, {"path": "x"}, {"path": "x"}),
        ({**PRESET, **FOLDER}, {"preset": "x"}, {"preset": "x", "tokenizer": "nano"}),
        ({**PRESET, **FOLDER}, {"tokenizer": "x"}, "give either preset or path"),
        ({**PRESET, **FOLDER}, {}, "give either preset or path"),
    ],
)
def test_another_beginning_replaces_the_first(
    file: Path, written: dict[str, str], overrides: dict[str, str], expected: Any
) -> None:
    file.write_text(toml({**tomllib.loads(LEAST), "model": written}))
    if isinstance(expected, str):
        message = refused(file, {"model": overrides})
        assert message.startswith(f"{file} and the command line: model: ")
        assert expected in message
    else:
        assert config.load(str(file), {"model": overrides}).model == ModelSection(**expected)


@pytest.mark.parametrize(
    "place",
    [
        "model.preset",
        "model.path",
        "model.tokenizer",
        "data.path",
        "run.output",
        "optimizer.freeze",
    ],
)
def test_what_no_file_can_hold_is_refused(file: Path, place: str) -> None:
    section, name = place.split(".")
    value = ("a", "\udcff") if name == "freeze" else "a\udcff"
    assert refused(file, {section: {name: value}}) == f"{place}: not a name of a file, or not UTF-8"


# --- differences


@given(tables, tables, st.data())
@given_files
def test_differences_are_what_changed(
    old: dict[str, Any], other: dict[str, Any], data: st.DataObject
) -> None:
    kept = data.draw(st.sets(st.sampled_from(sorted(KINDS))))
    mixed = {section: (old if section in kept else other)[section] for section in KINDS}
    assume(mixed["optimizer"]["warmup_steps"] <= mixed["run"]["steps"])
    new = made(mixed)
    before, after = fields(made(old)), fields(new)
    changed = {f"{s}.{n}" for s, n in before if before[s, n] != after[s, n]}
    found = config.differences(made(old), new)
    changed -= FREE
    assert len(found) == len(changed)
    assert {line.split(" was ")[0] for line in found} == changed
    assert config.differences(new, new) == []


def test_a_difference_tells_both(file: Path) -> None:
    old = config.load(str(file), {})
    for section, name, value, line in (
        ("run", "steps", 300, "run.steps was 200, now 300"),
        ("optimizer", "beta2", 0.9, "optimizer.beta2 was 0.95, now 0.9"),
        ("run", "seed", 1, "run.seed was 0, now 1"),
    ):
        assert config.differences(old, config.load(str(file), {section: {name: value}})) == [line]
    other: dict[str, Any] = dict(
        output="x", save_every=3, keep=5, spike=2.0, failure="skip", tensorboard=True
    )
    elsewhere = {"run": other, "step": {"remat": "full"}, "model": {"layout": "fsdp"}}
    assert config.differences(old, config.load(str(file), elsewhere)) == []
    begun = config.load(str(file), {"model": {"path": "x"}})
    assert config.differences(old, begun) == [
        'model.preset was "nano", now null',
        'model.path was null, now "x"',
        'model.tokenizer was "nano", now null',
    ]


def test_other_files_or_phases_are_another_run(mix: Path) -> None:
    old, text = config.load(str(mix), {}), mix.read_text()
    for before, after, kind in (
        ("weight = 3", "weight = 4", "source"),
        ("web.jsonl", "more.jsonl", "source"),
        (SECOND, SECOND + "batch = 4\n", "phase"),
    ):
        mix.write_text(instead(text, before, after))
        assert config.differences(old, config.load(str(mix), {})) == [f"a [[{kind}]] is another"]
    mix.write_text(text[: text.index("[[phase]]")])
    assert config.differences(old, config.load(str(mix), {})) == ["a [[phase]] is another"]


@pytest.mark.parametrize("value", ["x\ny\x1b\u2028\x85", "x" * 10_000, "模型\u202e"])
def test_a_difference_is_one_short_line(file: Path, value: str) -> None:
    old = config.load(str(file), {})
    for overrides in ({"data": {"path": value}}, {"optimizer": {"freeze": (value, "y")}}):
        (line,) = config.differences(old, config.load(str(file), overrides))
        assert line.isprintable()
        assert len(line) < 250


# --- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    found = config.load(path.stem, {})
    assert found == config.load(str(path), {})
    assert found.model.path is None
    preset = pangu_jax.preset(str(found.model.preset))
    assert found.data.length <= preset.max_positions
    assert (configs_folder() / "tokenizers" / str(found.model.tokenizer)).is_dir()


def test_there_is_a_shipped_configuration() -> None:
    assert "nano" in [path.stem for path in SHIPPED]


# --- the command line


def parse(*argv: str) -> Any:
    return cli.parse("pangu-train", "About.", commands.COMMANDS, argv)


@given(tables, st.sampled_from(["pretrain", "sft"]), st.data())
@settings(given_files, max_examples=10)
def test_every_field_is_a_flag(
    file: Path, table: dict[str, Any], command: str, data: st.DataObject
) -> None:
    groups = [[str(file)]]
    for section, values in table.items():
        for name, value in values.items():
            if isinstance(value, bool):
                groups.append([f"--{section}.{name}"] * value)
                continue
            items = value if isinstance(value, list) else [value]
            words = [item if isinstance(item, str) else repr(item) for item in items]
            groups.append([f"--{section}.{name}={word}" for word in words])
    file.write_text("")
    words = [word for group in data.draw(st.permutations(groups)) for word in group]
    parsed = parse(command, *words)
    assert type(parsed) is commands.COMMANDS[command]
    assert parsed.config == str(file)
    wanted = {
        section: {k: v for k, v in values.items() if v != []} for section, values in table.items()
    }
    assert config.load(parsed.config, parsed.overrides) == made(wanted)


def test_a_value_may_be_a_word_of_its_own() -> None:
    parsed = parse("sft", "nano", "--run.steps", "5", "--optimizer.learning_rate", "1e-4")
    assert parsed == commands.Sft(
        config="nano", overrides={"run": {"steps": 5}, "optimizer": {"learning_rate": 1e-4}}
    )
    parsed = parse("pretrain", "--optimizer.freeze", "embed", "nano", "--optimizer.freeze", "*.b c")
    assert parsed == commands.Pretrain(
        config="nano", overrides={"optimizer": {"freeze": ("embed", "*.b c")}}
    )
    assert parse("sft", "nano") == commands.Sft(config="nano", overrides={})
    assert parse("sft", "nano", "--run.steps=1", "--run.steps=2").overrides == {"run": {"steps": 2}}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["sft"], "required: CONFIG"),
        (["sft", "nano", "more"], "unrecognized arguments: more"),
        (["sft", "nano", "--run.step", "5"], "option '--run.step'; did you mean --run.steps?"),
        (["sft", "nano", "--runs.seed=5"], "option '--runs.seed'; did you mean --run.seed?"),
        (["sft", "--optimizer.learning-rate=1"], "did you mean --optimizer.learning_rate?"),
        (["sft", "nano", "--steps=5"], "unknown option '--steps'"),
        (["sft", "nano", "--run", "5"], "unknown option '--run'"),
        (["sft", "nano", "--source.path", "x"], "unknown option '--source.path'"),
        (["sft", "nano", "--phase", "x"], "unknown option '--phase'"),
        (["sft", "nano", "--step.remat", "some"], "'some' is not one of dots, full"),
        (["sft", "nano", "--optimizer.name=adam"], "'adam' is not one of adamw, muon"),
        (["sft", "nano", "--optimizer.ema="], "'' is not X"),
        (["sft", "nano", "--overrides", "{}"], "unknown option '--overrides'"),
        (["sft", "nano", "--run.steps"], "--run.steps: expected one argument"),
        (["sft", "nano", "--run.steps", "five"], "--run.steps: 'five' is not N"),
        (["sft", "nano", "--run.steps=5.0"], "'5.0' is not N"),
        (["sft", "nano", "--run.steps="], "'' is not N"),
        (["sft", "nano", "--run.seed=0x1"], "'0x1' is not N"),
        (["sft", "nano", "--optimizer.beta1", "high"], "--optimizer.beta1: 'high' is not X"),
        (["stf", "nano"], "unknown command 'stf'; did you mean sft?"),
    ],
)
def test_a_bad_command_line_is_one_line(argv: list[str], complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert complaint in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--run.steps=0"],
            "nano.toml and the command line: run: steps must be from 1 to 16777216",
        ),
        (["--run.steps", "-5"], "steps must be from 1 to 16777216, not -5"),
        (["--optimizer.learning_rate", "nan"], "must be a finite number"),
        (["--model.path=x", "--model.preset=nano"], "give either preset or path"),
        (["--model.path=x", "--model.tokenizer=nano"], "a folder brings its own"),
        (["--model.path=x"], "x/tokenizer.model"),
        (["--data.path=\udcff"], "data.path: not a name of a file, or not UTF-8"),
        (["--run.steps=5", "--optimizer.warmup_steps=6"], "warmup_steps (6) are more than run.ste"),
        (["--optimizer.frezee=x"], "did you mean --optimizer.freeze?"),
    ],
)
def test_at_the_door(tmp_path: Path, capsys, words: list[str], complaint: str) -> None:
    output = tmp_path / "run"
    for command in ("pretrain", "sft"):
        assert door.main([command, "nano", f"--run.output={output}", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert complaint in err
    assert not output.exists()


@pytest.mark.parametrize("command", ["pretrain", "sft"])
def test_help_names_every_field(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(command, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section, kind in KINDS.items():
        for field in dataclasses.fields(kind):
            assert f"--{section}.{field.name} " in text.replace("\n", " \n")
    assert KINDS.keys() | LISTS.keys() == {field.name for field in dataclasses.fields(Config)}
    assert "--source" not in text
    assert "--phase" not in text


def test_neither_help_nor_a_mistake_imports_jax() -> None:
    code = "import sys\nfrom train import config\nfrom train.__main__ import main\n"
    code += "assert main(['sft', 'nano', '--run.step=5']) == 2\nconfig.load('nano', {})\n"
    code += "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_parts_without_rows_are_refused(file: Path) -> None:
    message = refused(file, {"data": {"batch": 3}, "step": {"accumulate": 4}})
    assert "step.accumulate (4) is more than the 3 rows of a batch" in message
