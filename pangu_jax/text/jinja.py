"""Chat templates of untrusted folders: each is a program, run in a process of its own under limits.

jinja2's sandbox keeps a template from files and from Python; a worker process that can be killed
keeps it from this process's time and memory.
"""

import atexit
import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from pangu_jax import strict
from pangu_jax.errors import CheckpointError
from pangu_jax.text import jinja_worker
from pangu_jax.text.jinja_worker import LENGTH, MAX_OUTPUT_BYTES, MEMORY_BYTES, START_SECONDS

# For one rendering, which takes a millisecond.
SECONDS = 5.0


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a chat template makes of `variables`, which must be as JSON has them.

    Raises CheckpointError: one line with what is wrong, or with what the template itself raises.
    """
    try:
        request = json.dumps([SECONDS, template, variables], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(f"its variables cannot be passed to it ({error})") from None
    # Lone surrogates are not UTF-8 but may stand in JSON; this way they come back as they were.
    return _worker.ask(request.encode("utf-8", "surrogatepass"), SECONDS)


def refusal(reason: str) -> CheckpointError:
    """The error for a template that could not be rendered."""
    return CheckpointError(f"chat template: {strict.shorten(reason, quote=False, limit=200)}")


class Worker:
    """A process that renders, started when first needed and replaced when anything goes wrong."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, seconds: float) -> str:
        """The rendered text. Raises CheckpointError."""
        with self.lock:
            # Back in its place only after a whole exchange: whatever interrupts one, Ctrl-C as
            # well, no later call reads the reply to an earlier one.
            process, self.idle = self.idle, None
            try:
                if process is None or process.poll() is not None:
                    end(process)
                    process = start()
                    check(exchange(process, b"", START_SECONDS))
                reply = exchange(process, LENGTH.pack(len(request)) + request, seconds)
            except BaseException:
                end(process)
                raise
            self.idle = process
        return check(reply)

    def end(self) -> None:
        """Ends the process, if one is idle."""
        process, self.idle = self.idle, None
        end(process)

    def forget(self) -> None:
        """Leaves the process to the parent, of which this process is a fork."""
        process, self.idle, self.lock = self.idle, None, threading.Lock()
        if process and process.stdin and process.stdout:
            process.stdin.close()
            process.stdout.close()
            process.returncode = 0  # or it would warn that it was not waited for


def start() -> subprocess.Popen[bytes]:
    """A new worker process. In a session of its own, Ctrl-C does not reach it."""
    path = [entry for entry in sys.path if entry]
    try:
        return subprocess.Popen(
            [sys.executable, "-I", jinja_worker.__file__, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise refusal(f"no process to render it in can be started ({error.strerror})") from None


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Kills a worker process and frees what it holds here."""
    if process:
        process.kill()
        # Waits for it and closes the pipes: one may still hold what it did not read.
        with contextlib.suppress(OSError), process:
            pass


def exchange(process: subprocess.Popen[bytes], message: bytes, seconds: float) -> bytes:
    """The reply to a message. Raises CheckpointError.

    The worker reads all of one before it writes the other, so no pipe fills up on both sides, and
    ends itself when the time is over. A timer here could be broken by Ctrl-C: those of `threading`
    are, in the middle of their own locks.
    """
    assert process.stdin
    assert process.stdout
    begun, reply, length = time.monotonic(), b"", 0
    try:
        process.stdin.write(message)
        process.stdin.flush()
        (length,) = LENGTH.unpack(process.stdout.read(LENGTH.size))
        if length <= MAX_OUTPUT_BYTES + 1:  # more only if a template got out of the sandbox
            reply = process.stdout.read(length)
    except (struct.error, OSError):  # it ended before
        pass
    if reply and len(reply) == length:
        return reply
    if time.monotonic() - begun >= seconds:
        raise refusal(f"not done after {seconds:g} s")
    raise refusal(f"needs more than {MEMORY_BYTES >> 30} GiB of memory, or crashed")


def check(reply: bytes) -> str:
    """The text in a reply. Raises CheckpointError with the complaint that is there instead."""
    text = reply[1:].decode("utf-8", "surrogatepass")
    if reply[:1] != b"=":
        raise refusal(text)
    return text


_worker = Worker()
atexit.register(_worker.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
