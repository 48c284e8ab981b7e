"""Chat templates: ordinary ones, and the ways of a hostile one out of its process."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pangu_jax.errors import CheckpointError
from pangu_jax.text import jinja
from tests.limits import no_longer_than

ROOT = Path(__file__).parents[3]
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEADLINE = 1.0

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] | trim %}
    {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.first and system is defined %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content | trim + ' [/INST]' -}}
    {% else %}
{{ ' ' + content | trim + ' ' + eos_token -}}
    {% endif %}
{% endfor %}
"""
ECHO = "{{ messages[0].content }}"


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    said = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return ([{"role": "system", "content": system}] if system else []) + said


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja, "SECONDS", DEADLINE)


def refused(template: str, **variables: Any) -> str:
    """The one line about it, in time and without the memory; the next rendering works."""
    before = peak_bytes()
    with no_longer_than(20 + DEADLINE), pytest.raises(CheckpointError) as caught:
        jinja.render(template, variables)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    assert peak_bytes() - before < 64 * 2**20
    assert jinja.render("{{ 1 + 1 }}", {}) == "2"
    return message


def peak_bytes() -> int:
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def children(parent: int) -> list[int]:
    """The running child processes of a process, zombies as well."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def script(source: str) -> subprocess.Popen[str]:
    """A Python process that has the package, without JAX in it."""
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{source}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_chatml() -> None:
    messages = conversation("1 < 2?", "是的。")
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1 < 2?<|im_end|>\n"
    text += "<|im_start|>assistant\n是的。<|im_end|>\n"
    assert jinja.render(CHATML, {"messages": messages}) == text
    variables = {"messages": messages, "add_generation_prompt": True}
    assert jinja.render(CHATML, variables) == text + "<|im_start|>assistant\n"


def test_llama() -> None:
    variables = {
        "messages": conversation(" 你好 ", "Hi.", "And?", system=" Be kind. "),
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert jinja.render(LLAMA, variables) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n 你好 [/INST] Hi. </s><s>[INST] And? [/INST]"
    )


def test_the_message_a_template_raises_is_shown() -> None:
    messages = [{"role": "assistant", "content": "first"}]
    message = refused(LLAMA, messages=messages)
    assert message == "chat template: Roles must alternate user/assistant/user/assistant/..."
    assert "two\\x0alines" in refused("{{ raise_exception('two\nlines') }}")
    refused("{{ raise_exception('long' * 1000000) }}")
    refused("{{ raise_exception('\ud800') }}")
    refused("{{ raise_exception() }}")
    refused("{{ raise_exception(messages) }}", messages=messages * 1000)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% set n = namespace(a=0) %}{% for i in range(4) %}{% set n.a = n.a + i %}{% endfor %}"
         "{{ n.a }}", "6"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}", "abab"),
        ("a{% generation %}b{{ 1 }}{% endgeneration %}c", "ab1c"),
        ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
        ("{{ '<&>' }}{{ nothing }}", "<&>"),
        ("{{ 'a\r\nb' | length }}", "3"),
        ("{{ [3, 1, 2] | sort | join(',') }}{{ 'x' is string }}", "1,2,3True"),
        ("{{ messages is undefined }} {{ {'a': 1}.items() | list }}", "True [('a', 1)]"),
        ("{{ range(100000) | length }}", "100000"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_templates_use(template: str, text: str) -> None:
    assert jinja.render(template, {}) == text


def test_tojson_is_plain_json() -> None:
    tool = {"name": "天气", "b": [1, 2.5, None, True], "a": "<'\"&>\n"}
    render = lambda filter: jinja.render("{{ tool | " + filter + " }}", {"tool": tool})
    assert render("tojson") == json.dumps(tool, ensure_ascii=False)
    assert render("tojson(indent=2)") == json.dumps(tool, ensure_ascii=False, indent=2)
    assert render("tojson(ensure_ascii=true)") == json.dumps(tool)
    assert render("tojson(separators=(',', ':'), sort_keys=true)") == json.dumps(
        tool, ensure_ascii=False, separators=(",", ":"), sort_keys=True
    )


def test_the_date() -> None:
    years = {time.strftime("%Y"), str(int(time.strftime("%Y")) + 1)}
    assert jinja.render("{{ strftime_now('%Y') }}", {}) in years


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("a\n{% if %}", "line 2"),
        ("{{ x | nosuchfilter }}", "nosuchfilter"),
        ("{{ x.y }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% include 'other' %}", ""),
        ("{% import '/etc/passwd' as x %}", ""),
        ("{% extends 'other' %}", ""),
        ("{% generation %}", "endgeneration"),
        ("{% for i in x %}" * 100 + "{% endfor %}" * 100, ""),
        ("{{" + "(" * 100_000, ""),
        ("{{" + "[" * 5000 + "]" * 5000 + "}}", ""),
        ("{{" + "-" * 100_000 + "1 }}", ""),
        ("{% if a %}" * 5000 + "{% endif %}" * 5000, ""),
        ("{{ 1" + "0" * 10_000 + " }}", ""),
    ],
)
def test_a_broken_template_is_one_line(template: str, word: str) -> None:
    assert word in refused(template)


ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.x }}",
    "{{ raise_exception.__closure__[0] }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ strftime_now.__globals__.sys }}",
    "{{ namespace.__init__.__globals__.x }}",
    "{{ range.__self__.x }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
    "{{ (['{0.__class__.__mro__}']|map(attribute='format')|first)(1) }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{{ (messages|map(attribute='__class__')|first).__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{% do messages.append(1) %}",
    "{% set messages[0].role = 'x' %}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_the_sandbox_holds(template: str) -> None:
    messages = conversation("x")
    refused(template, messages=messages)
    assert messages == conversation("x")


@pytest.mark.parametrize(
    "template",
    ["{{ '{0.__class__}'.format(1) }}", "{{ ''|attr('__class__') }}", "{{ ''.__class__ }}"],
)
def test_what_the_sandbox_withholds_is_undefined(template: str) -> None:
    assert jinja.render(template, {}) == ""


MACRO = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
DOUBLING = "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WASTE = [
    FOREVER,
    MACRO,
    DOUBLING + "{% endfor %}",
    DOUBLING + "{{ n.s }}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ 'a' * (16 * 2**20 + 1) }}",
    "{{ '中' * (6 * 2**20) }}",
    "{% set a = 'a' * 10**12 %}",
    "{% set a = [0] * 10**12 %}",
    "{{ range(10**9) | list }}",
    "{% set a = 10 ** (10 ** 10) %}",
    "{% set a = (10 ** (10 ** 5)) | string %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ 'a' | indent(10**10, true) }}",
    "{{ [1] | tojson(indent=10**10) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ range(99999) | batch(1, 'x') | list | tojson(indent=99999) }}",
]


@pytest.mark.parametrize("template", WASTE)
@pytest.mark.usefixtures("impatient")
def test_no_template_takes_all_time_or_memory(template: str) -> None:
    start = time.monotonic()
    refused(template)
    assert time.monotonic() - start < DEADLINE + 10  # the next rendering waits for a new process


@pytest.mark.usefixtures("impatient")
def test_the_message_names_the_deadline() -> None:
    assert refused(FOREVER) == "chat template: not done after 1 s"


def test_variables_that_cannot_be_passed() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    refused("", x=deep)
    refused("", x=object())
    refused("", x=10**5000)
    deep = []
    deep.append(deep)
    refused("", x=deep)


def test_variables_as_deep_as_json_goes() -> None:
    for depth in (100, 900, 2000, 20_000):
        deep: list[Any] = []
        for _ in range(depth):
            deep = [deep]
        with contextlib.suppress(CheckpointError):
            jinja.render("{{ x | tojson }}{{ x }}", {"x": deep})
        assert jinja.render("{{ x }}", {"x": [[1]]}) == "[[1]]"


strings = st.text(st.characters() | st.characters(categories=["Cc", "Cs", "So"]))


@QUICK
@given(strings)
@example("\0\r\n\u2028\x85\x1b[31m")
@example("😀\ud800\ude00\udfff{{ x }}{% raw %}")
@example('"\\u0041\\"')
def test_any_content_comes_back(content: str) -> None:
    assert jinja.render(ECHO, {"messages": [{"role": "user", "content": content}]}) == content


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | strings,
    lambda inner: st.lists(inner) | st.dictionaries(strings, inner),
)


@QUICK
@given(values)
def test_any_value_comes_back(value: Any) -> None:
    assert json.loads(jinja.render("{{ x | tojson(true) }}", {"x": value})) == json.loads(
        json.dumps(value)
    )


words = st.sampled_from("{{ }} {% %} for in if endif endfor x . ( ) | ' -%}".split())


@QUICK
@given(strings | st.lists(words).map(" ".join))
def test_any_template_is_rendered_or_refused(template: str) -> None:
    message = ""
    try:
        jinja.render(template, {"x": [1]})
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 300


def test_megabytes_go_both_ways() -> None:
    content = "中文 text\n" * 500_000
    assert jinja.render(ECHO, {"messages": [{"content": content}]}) == content
    assert jinja.render("{{ x | length }}", {"x": content * 5}) == str(len(content) * 5)
    assert jinja.render("{{ 'a' * n }}", {"n": 16 * 2**20 - 1}) == "a" * (16 * 2**20 - 1)


def test_threads_share() -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for i in range(50):
            content = f"{name}{i}" * (1 + 1000 * (i % 3))
            try:
                if jinja.render(ECHO, {"messages": [{"content": content}]}) != content:
                    wrong.append(content)
                jinja.render("{{ raise_exception(x) }}", {"x": content})
            except CheckpointError as error:
                if name not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(f"<{i}>",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@LINUX
@pytest.mark.usefixtures("impatient")
def test_one_process_is_kept_and_none_is_left_behind() -> None:
    others = set(children(os.getpid()))
    for _ in range(3):
        refused("{% set a = 'a' * 10**12 %}")
    refused(FOREVER)
    (worker,) = set(children(os.getpid())) - others or {0}
    jinja.render(CHATML, {"messages": conversation("x")})
    assert (set(children(os.getpid())) - others or {0}) == {worker}


@LINUX
def test_a_process_that_was_killed_is_replaced() -> None:
    others = set(children(os.getpid()))
    process = script(
        "from pangu_jax.text import jinja\n"
        "print(jinja.render('1', {}), flush=True)\n"
        "input()\n"
        "print(jinja.render('2', {}))\n"
    )
    with process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "1\n"
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "2\n"
        assert process.stderr.read() == ""
    assert set(children(os.getpid())) == others


@pytest.mark.usefixtures("impatient")
def test_an_interrupt_leaves_nothing_behind() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    jinja.render("", {})
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for seconds in (0.001, 0.01, 0.05, 0.2):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt):
                jinja.render(FOREVER, {})
            assert jinja.render("{{ x }}", {"x": seconds}) == str(seconds)
    finally:
        signal.signal(signal.SIGALRM, old)


@LINUX
@pytest.mark.parametrize("way", ["exit", "kill", "kill while rendering"])
def test_the_process_ends_with_its_parent(way: str) -> None:
    process = script(
        "from pangu_jax.text import jinja\n"
        "jinja.SECONDS = 2.0\n"
        "print(jinja.render('ready', {}), flush=True)\n"
        + (f"jinja.render({FOREVER!r}, {{}})\n" if "while" in way else "input()\n")
    )
    with process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "ready\n"
        (worker,) = children(process.pid)
        assert os.getpgid(worker) != os.getpgid(process.pid)  # Ctrl-C does not reach it
        if way == "exit":
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait() == 0
            assert process.stderr.read() == ""
            assert not runs(worker)
        else:
            time.sleep(0.3 if "while" in way else 0)
            process.kill()
    with no_longer_than(20):
        while runs(worker):
            time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_a_process_of_its_own() -> None:
    process = script(
        "import os\n"
        "from pangu_jax.text import jinja\n"
        "jinja.render('', {})\n"
        "child = os.fork()\n"
        "for i in range(300):\n"
        "    assert jinja.render('{{ x }}', {'x': [child, i]}) == str([child, i])\n"
        "sys.exit(child and os.waitpid(child, 0)[1])\n"
    )
    with no_longer_than(60):
        _, complaint = process.communicate()
    assert (process.returncode, complaint) == (0, "")


def test_without_jinja2() -> None:
    process = script(
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "from pangu_jax.text import jinja\n"
        "try: jinja.render('', {})\n"
        "except jinja.CheckpointError as error: print(error)\n"
    )
    with no_longer_than(60):
        said, complaint = process.communicate()
    assert complaint == ""
    assert "pip install jinja2" in said


def test_a_turn_takes_a_millisecond() -> None:
    messages = conversation(*["A question of some length, or its answer. " * 10] * 10)
    jinja.render(CHATML, {"messages": messages})
    taken = []
    for _ in range(300):
        start = time.perf_counter()
        jinja.render(CHATML, {"messages": messages})
        taken.append(time.perf_counter() - start)
    median = statistics.median(taken) * 1000
    print(f"{median:.2f} ms a rendering")
    assert median < 100
