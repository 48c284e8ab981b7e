"""The process behind `jinja.py`: chat templates rendered in jinja2's sandbox, under limits.

It is run by its file name, so it imports the standard library and jinja2 alone. Messages are bytes
after their length. A request is the JSON list [seconds, template, variables]; a reply is `=` and
the text, or `!` and the reason why there is none. The first reply says that the process is ready.
"""

import contextlib
import datetime
import faulthandler
import functools
import json
import os
import struct
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

try:
    import resource
except ImportError:  # on Windows, where only the time is limited
    resource = None

MEMORY_BYTES = 2**30
MAX_OUTPUT_BYTES = 16 * 2**20
START_SECONDS = 60.0  # Python and jinja2, on a busy machine
LENGTH = struct.Struct("<Q")

# No core dumps, and nothing is written to files.
LIMITS = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0}


@functools.cache
def environment() -> "jinja2.Environment":
    """What chat templates are written for, as transformers sets it up."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what training would learn; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: Any) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return made


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """`value` as JSON. The filter of jinja2 itself would escape what HTML does not allow."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=4)
def compiled(template: str) -> "jinja2.Template":
    """The template, compiled once for all turns of a conversation."""
    return environment().from_string(template)


def answer(request: bytes) -> bytes:
    """The reply to a request. Out of time or memory there is none: the process ends."""
    try:
        seconds, template, variables = json.loads(request.decode("utf-8", "surrogatepass"))
        # A thread that needs no lock of Python's: it ends the process amid 10 ** (10 ** 10), too.
        faulthandler.dump_traceback_later(seconds, exit=True)
        text = bytearray(b"=")
        for piece in compiled(template).generate(variables):
            text += piece.encode("utf-8", "surrogatepass")
            if len(text) > MAX_OUTPUT_BYTES:
                return f"!writes more than {MAX_OUTPUT_BYTES >> 20} MiB".encode()
        return bytes(text)
    except MemoryError:
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        return b"!" + describe(error)[:1000].encode("utf-8", "surrogatepass")
    finally:
        faulthandler.cancel_dump_traceback_later()


def describe(error: Exception) -> str:
    """What a template did wrong."""
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, jinja2.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def limit() -> None:
    """Sets the limits for good, as far as this system has them."""
    for name, most in LIMITS.items():
        kind = getattr(resource, name, None)
        if resource and kind is not None:
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some
                hard = resource.getrlimit(kind)[1]
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(kind, (most, most))


def send(reply: bytes) -> None:
    """Writes a message to standard output."""
    sys.stdout.buffer.write(LENGTH.pack(len(reply)) + reply)
    sys.stdout.buffer.flush()


def main() -> None:
    """Answers requests from standard input until it ends. The arguments are the import path."""
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    sys.path[:] = sys.argv[1:]
    try:
        environment()
    except ImportError:
        send(b"!rendering it needs jinja2: pip install jinja2")
        return
    limit()  # after the imports, which may write compiled files
    faulthandler.cancel_dump_traceback_later()
    send(b"=")
    while length := sys.stdin.buffer.read(LENGTH.size):
        send(answer(sys.stdin.buffer.read(*LENGTH.unpack(length))))


if __name__ == "__main__":
    main()
