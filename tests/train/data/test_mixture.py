"""A run's files, through its configuration: tokenised once, mixed as each phase says."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu_jax.config import configs_folder
from pangu_jax.errors import InputError
from pangu_jax.text.tokenizer import Tokenizer
from train import pretrain
from train.config import (
    Config,
    DataSection,
    ModelSection,
    OptimizerSection,
    Phase,
    RunSection,
    Source,
)
from train.data.examples import Encode, Example, Learn
from train.data.mixture import Data, Reader
from train.objectives import Batch

NANO = configs_folder() / "tokenizers" / "nano"
TOKENIZER = Tokenizer.load(NANO)
UNIT = 10_000


def numbers(tokenizer: Tokenizer, learn: Learn) -> Encode:
    """{"ids": [...]}: an example as it is."""

    def encode(line: dict[str, Any]) -> Iterator[Example]:
        if not isinstance(line.get("ids"), list):
            raise InputError("no ids")
        yield Example(np.array(line["ids"], np.int32), np.ones(len(line["ids"]), bool))

    return encode


def never(tokenizer: Tokenizer, learn: Learn) -> Encode:
    def encode(line: dict[str, Any]) -> Iterator[Example]:
        raise AssertionError("it was tokenised already")

    return encode


CUT, WHOLE = Reader("numbers", numbers, cut=True), Reader("numbers", numbers, cut=False)
NEVER = Reader("numbers", never, cut=True)


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def numbered(source: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Examples whose tokens say which source they are of, and of which example."""
    return [{"ids": [UNIT * source + 100 * i + k for k in range(s)]} for i, s in enumerate(sizes)]


def config(*sources: Source, phases: tuple[Phase, ...] = (), **data: Any) -> Config:
    steps = sum(phase.steps for phase in phases) or 10
    return Config(
        ModelSection(preset="nano", tokenizer="nano"),
        DataSection(**{"length": 8, "batch": 2, **data}),
        RunSection(output="run", steps=steps, seed=5),
        optimizer=OptimizerSection(warmup_steps=0),
        source=sources,
        phase=phases,
    )


def data(config: Config, folder: Path, reader: Reader = CUT, home: Path = NANO) -> Data:
    return Data(config, reader, TOKENIZER, home, folder)


def sources_in(batch: Batch) -> list[int]:
    """Of every row the only source that it is of."""
    rows = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        (source,) = set((tokens[segments > 0] // UNIT).tolist())
        rows.append(source)
    return rows


@pytest.fixture
def two(tmp_path: Path) -> tuple[Source, Source]:
    """A source of nine rows of 8, or of four and a half of 16; and one of two rows of 8."""
    a = write(tmp_path / "a.jsonl", *numbered(1, [8, 4, 4, 9, 7, 8, 8, 6, 17]))
    b = write(tmp_path / "b.jsonl", *numbered(2, [5, 8, 3]))
    return Source("a", a), Source("b", b, 3.0)


# --- phases

PHASES = (
    Phase(4, weights={"a": 1, "b": 0}),
    Phase(30, length=16, batch=3, weights={"a": 2.0, "b": 1.0}),
    Phase(2),
    Phase(2, weights={"b": 1}),
)


def test_phases_have_rows_and_weights_of_their_own(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    run = config(*two, phases=PHASES)
    found = data(run, tmp_path / "run")
    first, second, third, last = (found.feed(stage) for stage in run.stages)

    batches = [*itertools.islice(first.since(0), 20)]
    assert {batch.tokens.shape for batch in batches} == {(2, 8)}
    assert {source for batch in batches for source in sources_in(batch)} == {1}

    batches = [*itertools.islice(second.since(0), 30)]
    assert {batch.tokens.shape for batch in batches} == {(3, 16)}
    seen = np.array([source for batch in batches for source in sources_in(batch)])
    assert (np.abs(np.cumsum(seen == 1) - np.arange(1, 91) * 2 / 3) < 1).all()

    # As the sources and the other sections say.
    batches = [*itertools.islice(third.since(0), 30)]
    assert {batch.tokens.shape for batch in batches} == {(2, 8)}
    seen = np.array([source for batch in batches for source in sources_in(batch)])
    assert (np.abs(np.cumsum(seen == 2) - np.arange(1, 61) * 3 / 4) < 1).all()

    assert sources_in(last[0]) == sources_in(last[7]) == [2, 2]


def test_every_epoch_of_a_phase_has_the_whole_file(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    """Packed into the rows of the phase: 10 of 8 tokens, or 5 of 16."""
    alone = {"batch": 1, "weights": {"a": 1}}
    run = config(*two, phases=(Phase(2, **alone), Phase(2, length=16, **alone)))
    found = data(run, tmp_path / "run")
    cuts = [[307, 807, 814], [815]]  # what two pieces share
    for stage, rows, shared in zip(run.stages, (10, 5), cuts, strict=True):
        feed = found.feed(stage)
        for begin in (0, rows, 2 * rows):
            batches = [feed[number] for number in range(begin, begin + rows)]
            tokens = [token for b in batches for token in b.tokens[b.segments > 0].tolist()]
            whole = [id for line in read(two[0]) for id in line["ids"]]
            assert sorted(tokens) == sorted(whole + [UNIT + token for token in shared])


def test_a_feed_can_go_on_at_any_batch_of_a_phase(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    run = config(*two, phases=PHASES)
    first, again = data(run, tmp_path / "run"), data(run, tmp_path / "run", NEVER)
    for stage in run.stages:
        feed, other = first.feed(stage), again.feed(stage).since(3)
        for number in range(3, 8):
            batch = next(other)
            np.testing.assert_array_equal(feed[number].tokens, batch.tokens)
            np.testing.assert_array_equal(feed[number].weights, batch.weights)


def test_the_seed_of_the_run_orders_the_rows(tmp_path: Path, two: tuple[Source, Source]) -> None:
    run = config(*two, batch=16)
    other = dataclasses.replace(run, run=dataclasses.replace(run.run, seed=6))
    a, b = (data(each, tmp_path / "run").feed(each.stages[0])[0].tokens for each in (run, other))
    assert a.tolist() != b.tolist()


def test_a_later_phase_does_not_begin_as_the_first_did(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    run = config(*two, phases=(Phase(2, batch=8), Phase(2, batch=8)))
    a, b = (data(run, tmp_path / "run").feed(stage)[0].tokens for stage in run.stages)
    assert a.tolist() != b.tolist()


def test_one_file_needs_no_name(tmp_path: Path, two: tuple[Source, Source]) -> None:
    run = config(path=two[1].path)
    found = data(run, tmp_path / "run")
    assert list(found.stores) == ["data"]
    assert sources_in(found.feed(run.stages[0])[0]) == [2, 2]


# --- tokenised once


def test_files_are_tokenised_once(tmp_path: Path, two: tuple[Source, Source]) -> None:
    run = config(*two, phases=PHASES)
    first = data(run, tmp_path / "run")
    again = data(run, tmp_path / "run", NEVER)
    assert again.digest == first.digest
    assert {name: len(store) for name, store in again.stores.items()} == {"a": 9, "b": 3}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a", "b"]


def test_only_the_file_that_is_another_is_tokenised_again(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    a, b = two
    digest = data(config(a, b), tmp_path / "run").digest
    other = numbered(2, [5, 8, 3])
    other[0]["ids"][0] += 1
    write(Path(b.path), *other)
    with pytest.raises(AssertionError, match="already"):
        data(config(a, b), tmp_path / "run", NEVER)
    found = data(config(a, b), tmp_path / "run")
    assert found.digest != digest
    assert found.stores["b"].tokens.tolist() == [id for line in other for id in line["ids"]]
    data(config(a), tmp_path / "run", NEVER)


def test_what_a_run_reads_has_one_digest_wherever_it_lies(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    a, b = two
    shutil.copy(a.path, tmp_path / "copy.jsonl")
    moved = dataclasses.replace(a, path=str(tmp_path / "copy.jsonl"))
    digests = [
        data(config(*sources), tmp_path / str(number)).digest
        for number, sources in enumerate([(a, b), (moved, b), (b,), (a,)])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_other_options_and_tokenizers_are_read_anew(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    home, run = tmp_path / "home", config(two[0])
    shutil.copytree(NANO, home)
    data(run, tmp_path / "run", home=home)
    for name in ("generation_config.json", "corpus.txt"):  # neither says how text is tokenised
        (home / name).write_text("{}")
        data(run, tmp_path / "run", NEVER, home)
    longer = config(two[0], length=16, batch=1, packing="first-fit")
    data(longer, tmp_path / "run", NEVER, home)

    other = Reader("other", never, cut=True)
    for reader, again in (
        (NEVER, config(two[0], learn="last")),
        (NEVER, config(two[0], bad="skip")),
        (other, run),
    ):
        data(run, tmp_path / "run", home=home)
        with pytest.raises(AssertionError, match="already"):
            data(again, tmp_path / "run", reader, home)
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.model"):
        data(run, tmp_path / "run", home=home)
        with (home / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(AssertionError, match="already"):
            data(run, tmp_path / "run", NEVER, home)


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_a_file_of_another_kind_is_the_same_data(tmp_path: Path, kind: str) -> None:
    """Conversations and documents: fields without a value are none."""
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "thinking": "hm"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No.", "learn": False},
        {"role": "assistant", "content": "Yes.", "learn": True},
    ]
    lines = [{"text": "One"}, {"messages": talk, "think": "slow"}, {"messages": talk[:2]}]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        names = ("text", "messages", "think")  # each of them a column, whatever a record has
        table = pyarrow.table({name: [line.get(name) for line in lines] for name in names})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(json.dumps(line).encode())
        writer.close()
    plain = write(tmp_path / "data.jsonl", *lines)
    digests = [
        data(config(Source("a", file)), tmp_path / name, pretrain.READER).digest
        for name, file in (("plain", plain), ("other", str(path)))
    ]
    assert digests[0] == digests[1]


# --- what is told, and refused


def test_bad_lines_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", {"ids": [1, 2]}, {"no": 1}, {"ids": [3]}, {"ids": 5})
    found = data(config(Source("a", path), bad="skip"), tmp_path / "run")
    told = tmp_path / "run" / "a" / "skipped.txt"
    assert f"{path}: 2 bad lines are left out; see {told}" in capsys.readouterr().err
    assert told.read_text() == f"{path}, line 2: no ids\n{path}, line 4: no ids\n"
    assert found.stores["a"].tokens.tolist() == [1, 2, 3]
    data(config(Source("a", path), bad="skip"), tmp_path / "run", NEVER)
    assert "2 bad lines" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: no ids"):
        data(config(Source("a", path)), tmp_path / "run")


def test_examples_that_are_left_out_are_told_once(
    tmp_path: Path, two: tuple[Source, Source], capsys: pytest.CaptureFixture
) -> None:
    run = config(*two, phases=(Phase(1), Phase(1), Phase(1, length=16)))
    found = data(run, tmp_path / "run", WHOLE)
    assert capsys.readouterr().err == ""
    for stage in run.stages:
        found.feed(stage)
    lines = capsys.readouterr().err.splitlines()
    a, b = (source.path for source in two)
    assert lines == [
        f"{a}: 2 of 9 examples are longer than data.length (8) and left out; "
        "the longest has 17 tokens",
        f"{a}: 7 examples in 6 rows of 8 tokens, 93.8% filled",
        f"{b}: 3 examples in 2 rows of 8 tokens, 100.0% filled",
        f"{a}: 1 of 9 examples are longer than data.length (16) and left out; "
        "the longest has 17 tokens",
        f"{a}: 8 examples in 4 rows of 16 tokens, 84.4% filled",
        f"{b}: 3 examples in 1 rows of 16 tokens, 100.0% filled",
    ]


def silent(tokenizer: Tokenizer, learn: Learn) -> Encode:
    """Examples of which only those that begin with 1 are learnt."""

    def encode(line: dict[str, Any]) -> Iterator[Example]:
        for example in numbers(tokenizer, learn)(line):
            yield Example(example.ids, np.full(example.ids.size, example.ids[0] == 1))

    return encode


def test_a_file_with_nothing_to_learn_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", {"ids": [2, 2]}, {"ids": [1, 2]})
    reader = Reader("silent", silent, cut=True)
    assert len(data(config(Source("a", good)), tmp_path / "good", reader).stores["a"]) == 2
    for number, lines in enumerate(([], [{"ids": [2, 2]}, {"ids": [3]}])):
        bad = write(tmp_path / f"bad{number}.jsonl", *lines)
        with pytest.raises(InputError, match=rf"bad{number}\.jsonl: nothing to learn from"):
            data(config(Source("a", good), Source("b", bad)), tmp_path / str(number), reader)


def test_a_phase_whose_rows_are_too_short_names_the_file(
    tmp_path: Path, two: tuple[Source, Source]
) -> None:
    run = config(*two, phases=(Phase(1), Phase(1, length=2), Phase(1, length=2, weights={"a": 1})))
    found = data(run, tmp_path / "run", WHOLE)
    found.feed(run.stages[0])
    for stage in run.stages[1:]:
        with pytest.raises(InputError, match=r"a\.jsonl: nothing to learn .* rows of 2 tokens"):
            found.feed(stage)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, two: tuple[Source, Source]) -> None:
    missing = Source("c", str(tmp_path / "c.jsonl"), 0.0)
    with pytest.raises(InputError, match=r"c\.jsonl: no such file"):
        data(config(*two, missing), tmp_path / "run")


def read(source: Source) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(source.path).read_text().splitlines()]
