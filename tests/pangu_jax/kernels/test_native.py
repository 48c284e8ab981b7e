"""How the C++ is compiled and kept, and what happens where it cannot be."""

import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pangu_jax.kernels import native
from pangu_jax.kernels.experts import mix_experts
from pangu_jax.kernels.experts.held import Experts
from pangu_jax.kernels.native import build
from tests.pangu_jax.kernels import cached, oracle

SOURCES = len(list(build.SOURCE.glob("*.cc")))

# Shell that puts something where the option -o says.
MAKE = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo something > "$2"; shift; done'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no compiler that is named, and kernels that nobody asked for yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", "PANGU_JAX_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "missing", functools.cache(native.missing.__wrapped__))
    return tmp_path


@pytest.fixture
def compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names a compiler that does what a line of shell says; returns how often it was called."""
    path, log = home / "compiler", home / "log"

    def stand_in(shell: str) -> Any:
        path.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{shell}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return lambda: len(log.read_text().splitlines()) if log.exists() else 0

    return stand_in


def kept(home: Path) -> list[str]:
    """The files in the cache, but for the lock."""
    return sorted({p.name for p in (home / "cache/pangu_jax/kernels").iterdir()} - {"lock"})


# --- no compiler


def nothing_named(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    return "no-such-compiler"


def nothing_on_the_path(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", "")
    return "clang++"


without_compiler = pytest.mark.parametrize("take", [nothing_named, nothing_on_the_path])


@without_compiler
def test_no_compiler(take: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = take(monkeypatch)
    with pytest.raises(build.CompileError, match=r"no C\+\+ compiler"):
        build.library()
    assert said in native.missing()
    assert "\n" not in native.missing()
    assert not native.available()


@without_compiler
def test_everything_works_without(take: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name the kernels say why they are not there."""
    said = take(monkeypatch)
    own = cached.case("float32", 0, cached.Shape(2, 3, 2, 2, 16, 20, 7))
    arguments = oracle.experts("dynamic float32", 0, 5, 2, 3, 17, 9)
    attend = lambda name: cached.attend(
        own.queries, own.keys, own.values, own.meta(), None, implementation=name
    )
    mix = lambda *given, name=None: mix_experts(*given[:3], Experts(*given[3:]), None, name)
    got = np.asarray(jax.jit(lambda: attend(None))())
    oracle.close(got[own.valid], cached.wanted(own)[own.valid], 1e-5)
    oracle.close(jax.jit(mix)(*arguments), oracle.mix_experts(*arguments)[0], 0.03)
    for by_name in (lambda: attend("native"), lambda: mix(*arguments, name="native")):
        with pytest.raises(NotImplementedError, match=said.replace("+", r"\+")):
            by_name()


def test_kernels_can_be_declined(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler(MAKE)
    monkeypatch.setenv("PANGU_JAX_NATIVE", "0")
    assert native.missing() == "PANGU_JAX_NATIVE=0"
    assert not native.available()
    assert calls() == 0


# --- a compiler that fails

FAILURES = {
    "at once": "echo 'x.cc:1: error: that is no C++' >&2; exit 1",
    "saying much": "for i in 1 2 3 4 5 6 7 8 9; do echo note $i >&2; done; echo error: >&2; exit 1",
    "saying nothing": "exit 1",
    "saying what is no text": r"printf '\377\376 error: \200\n' >&2; exit 1",
    "killed": "kill -9 $$",
    "late": f'case "$*" in *-shared*) echo error: no linker >&2; exit 1;; esac; {MAKE}',
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_compiler_that_fails(failure: str, home: Path, compiler: Any) -> None:
    """Is named in one line, leaves nothing behind, and may be better the next time."""
    compiler(FAILURES[failure])
    with pytest.raises(build.CompileError):
        build.library()
    reason = native.missing()
    assert str(home / "compiler") in reason
    assert "\n" not in reason
    assert len(reason) < 400
    assert kept(home) == []
    compiler(MAKE)
    assert build.library().is_file()


def test_the_line_that_says_error_is_shown(compiler: Any) -> None:
    compiler("echo first >&2; echo 'x.cc:1: error: that is no C++' >&2; echo last >&2; exit 1")
    assert native.missing().endswith("failed: x.cc:1: error: that is no C++")


def test_a_command_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'c++ "-O1')
    with pytest.raises(build.CompileError):
        build.library()


def test_a_library_that_cannot_be_loaded(compiler: Any) -> None:
    compiler(MAKE)
    assert "kernels-" in native.missing()
    assert "\n" not in native.missing()


# --- the cache


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_can_write_to_is_refused(mode: int, home: Path, compiler: Any) -> None:
    """What lies there is executed."""
    calls, folder = compiler(MAKE), home / "cache/pangu_jax/kernels"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(build.CompileError, match="can be written to by others"):
        build.library()
    assert str(folder) in native.missing()
    assert calls() == 0
    folder.chmod(0o755)
    assert build.library().parent == folder


def test_a_folder_of_somebody_else_is_refused(
    compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(MAKE)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(build.CompileError, match="can be written to by others"):
        build.library()
    assert calls() == 0


def test_a_new_folder_is_this_users_alone(home: Path, compiler: Any) -> None:
    compiler(MAKE)
    mask = os.umask(0)
    try:
        folder = build.library().parent
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_no_folder(home: Path, compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, or an account without a home."""
    compiler(MAKE)
    (home / "cache").write_text("")
    with pytest.raises(build.CompileError, match="Not a directory"):
        build.library()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(build.CompileError, match="no home"):
        build.library()


def test_the_library_is_kept(home: Path, compiler: Any) -> None:
    calls = compiler(MAKE)
    made = build.library()
    assert calls() == SOURCES + 1
    assert made.read_text() == "something\n"
    assert kept(home) == [made.name]
    assert build.library() == made
    assert calls() == SOURCES + 1


def test_another_process_may_have_made_it_meanwhile(
    compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for the lock looks again."""
    calls = compiler(MAKE)
    target = build.cache_folder() / f"kernels-{build._key(build.find_compiler())}.so"

    def wait(lock: Any, kind: int) -> None:
        if kind == fcntl.LOCK_EX:
            target.write_text("of another process")

    monkeypatch.setattr(fcntl, "flock", wait)
    assert build.library() == target
    assert calls() == 0
    assert target.read_text() == "of another process"


def test_the_key_changes_with_what_is_compiled(
    home: Path, compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(MAKE)
    command = build.find_compiler()
    keys = [build._key(command)]
    assert build._key(command) == keys[0]
    keys.append(build._key([*command, "-fsomething"]))
    with monkeypatch.context() as changed:
        changed.setattr(build, "FLAGS", ("-O2", *build.FLAGS))
        keys.append(build._key(command))
    with monkeypatch.context() as changed:
        changed.setattr(build, "version", lambda name: f"another {name}")
        keys.append(build._key(command))
    with monkeypatch.context() as changed:
        changed.setattr(build, "_processor", lambda: "another one")
        keys.append(build._key(command))
    shutil.copytree(build.SOURCE, home / "source")
    monkeypatch.setattr(build, "SOURCE", home / "source")
    for name in ("pool.h", "write.cc"):
        with (home / "source" / name).open("a") as file:
            file.write("// changed\n")
        keys.append(build._key(command))
    Path(command[0]).write_text("#!/bin/sh\nexit 0  # a later version\n")
    keys.append(build._key(command))
    assert len(set(keys)) == len(keys)


# --- the real one


@pytest.mark.slow
def test_of_two_processes_one_compiles(home: Path, compiler: Any) -> None:
    """They start together with an empty cache, and both end with kernels that work."""
    calls = compiler(f'exec {build.find_compiler()[0]} "$@"')
    program = """
import jax.numpy as jnp
from pangu_jax.kernels.matmul import matmul
from pangu_jax.kernels.native import build
print(float(matmul(jnp.ones((2, 3)), jnp.ones((4, 3)), implementation="native")[1, 3]))
print(build.library())
"""
    command = [sys.executable, "-c", program]
    where = dict(stdout=subprocess.PIPE, text=True, cwd=build.SOURCE.parents[2])
    both = [subprocess.Popen(command, **where) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert said[0] == said[1]
    assert said[0][0] == "3.0"
    assert calls() == SOURCES + 1
    assert kept(home) == [Path(said[0][1]).name]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("without", ["avx512f", "avx"])
def test_as_a_lesser_processor(without: str, home: Path) -> None:
    """The kernels' own tests, compiled for fewer instructions than this processor has."""
    names = ("matmul", "experts", "swiglu", "attention")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    compiler = " ".join(build.find_compiler())
    env = {**os.environ, "CXX": f"{compiler} -mno-{without}"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
