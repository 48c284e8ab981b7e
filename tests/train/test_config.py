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
from train.config import Config, DataSection, ModelSection, OptimizerSection, RunSection

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


def table_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields)


def with_steps_to_warm_up(table: dict[str, Any]) -> dict[str, Any]:
    table["optimizer"]["warmup_steps"] %= table["run"]["steps"] + 1
    return table


# As in a file, and not the dataclasses: run-time type checks draw random numbers of their own.
tables = table_of(
    model=table_of(preset=texts, tokenizer=texts) | table_of(path=texts),
    data=table_of(path=texts, length=whole(2), batch=whole(1)),
    run=table_of(
        output=texts,
        steps=whole(1, 2**24),
        save_every=whole(1, 2**24),
        seed=whole(0, 2**31 - 1),
    ),
    optimizer=table_of(
        learning_rate=numbers(0, 1e30, exclude_min=True),
        final_fraction=numbers(0, 1),
        warmup_steps=whole(0, 2**24),
        beta1=numbers(0, 1, exclude_max=True),
        beta2=numbers(0, 1, exclude_max=True),
        weight_decay=numbers(0, 1e300),
        clip_norm=numbers(0, 1e30, exclude_min=True),
        freeze=st.lists(texts, max_size=3),
    ),
).map(with_steps_to_warm_up)

KINDS = {
    "model": ModelSection,
    "data": DataSection,
    "run": RunSection,
    "optimizer": OptimizerSection,
}


def made(table: dict[str, dict[str, Any]]) -> Config:
    return Config(
        **{
            section: KINDS[section](
                **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            )
            for section, values in table.items()
        }
    )


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


@given(tables)
@given_files
def test_to_toml_and_back(file: Path, table: dict[str, Any]) -> None:
    text = config.to_toml(made(table))
    file.write_text(text, encoding="utf-8")
    assert config.load(str(file), {}) == made(table)
    # What another reader of TOML finds: everything that has a value.
    found = tomllib.loads(text)
    assert found == table
    for section, values in table.items():
        assert {k: type(v) for k, v in found[section].items()} == {
            k: type(v) for k, v in values.items()
        }


def test_defaults_are_spelt_out(file: Path) -> None:
    assert tomllib.loads(config.to_toml(config.load(str(file), {}))) == {
        "model": {"preset": "nano", "tokenizer": "nano"},
        "data": {"path": "data.jsonl", "length": 1024, "batch": 8},
        "run": {"output": "runs/a", "steps": 200, "save_every": 500, "seed": 0},
        "optimizer": {
            "learning_rate": 1e-3,
            "final_fraction": 0.1,
            "warmup_steps": 100,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "freeze": [],
        },
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
    ("run", "seed"): (-1, 2**31),
    ("optimizer", "learning_rate"): (0.0, -1e-9, math.inf, math.nan),
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
    ("run", "seed"): (0, 2**31 - 1),
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
    kinds_differ = written["model"].keys() != other["model"].keys()
    places = [(s, n) for s in written for n in other[s] if s != "model" or not kinds_differ]
    chosen = set(data.draw(st.lists(st.sampled_from(sorted(places)))))
    expected = {section: dict(values) for section, values in written.items()}
    if kinds_differ and data.draw(st.booleans()):
        chosen |= {("model", name) for name in other["model"]}
        expected["model"] = {}
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
    changed -= {"run.output", "run.save_every"}
    found = config.differences(made(old), new)
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
    for name, value in (("output", "elsewhere"), ("save_every", 3)):
        assert config.differences(old, config.load(str(file), {"run": {name: value}})) == []
    begun = config.load(str(file), {"model": {"path": "x"}})
    assert config.differences(old, begun) == [
        'model.preset was "nano", now null',
        'model.path was null, now "x"',
        'model.tokenizer was "nano", now null',
    ]


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
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert f"--{section.name}.{field.name} " in text


def test_neither_help_nor_a_mistake_imports_jax() -> None:
    code = "import sys\nfrom train import config\nfrom train.__main__ import main\n"
    code += "assert main(['sft', 'nano', '--run.step=5']) == 2\nconfig.load('nano', {})\n"
    code += "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys(), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
