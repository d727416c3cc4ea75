# SPDX-License-Identifier: Apache-2.0
"""Chat messages to prompt text, by the model's Jinja template.

A template comes with the model, from strangers, and Jinja is a programming language. It is rendered in Jinja's
immutable sandbox, and, since the sandbox bounds neither time nor memory, in a separate small process
(template_worker.py) that the kernel stops. The process is started on first use, kept, and replaced when it dies.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.errors import FastserveError, InvalidRequest

MAX_OUTPUT_CHARS = 4 * 2**20
MAX_CPU_S = 2.0  # processor time of one rendering; usual templates take well under a millisecond
MAX_WALL_S = 120.0  # a last resort for a machine that gives the worker no processor time at all
MAX_MEMORY = 512 * 2**20
MAX_TEMPLATE_CHARS = 2**20
MAX_KWARGS = 64

# Names a caller's extra variables must not take: what rendering itself sets, what templates rely on, and the
# switches that other engines' template functions take from the same dictionary.
RESERVED = frozenset(
    [
        "messages",
        "conversation",
        "template",
        "chat_template",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "continue_final_message",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "raise_exception",
        "strftime_now",
        "namespace",
        "range",
        "dict",
        "lipsum",
        "cycler",
        "joiner",
        "self",
        "loop",
        "super",
        "caller",
        "varargs",
        "kwargs",
        "context",
        "environment",
    ]
)


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidRequest unless these extra variables may be passed to a template."""
    if len(kwargs) > MAX_KWARGS:
        raise InvalidRequest(f"at most {MAX_KWARGS} chat template variables are allowed, got {len(kwargs)}")
    for name in kwargs:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or name in RESERVED:
            raise InvalidRequest(
                f"the chat template variable {name!r:.100} is reserved or not a name; reserved are "
                f"{', '.join(sorted(RESERVED))}"
            )


def check_messages(messages: Any) -> None:
    """Raise InvalidRequest unless `messages` is a non-empty list of messages with a role."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages must be a non-empty list of {role, content} objects")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{index}] must be an object with the string `role`")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise InvalidRequest(
                f"messages[{index}].content must be a string or a list of parts, got {type(content).__name__}"
            )


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **kwargs: Any,
) -> str:
    """The prompt of a conversation, special tokens included (so encode it with add_special_tokens=False).

    `kwargs` are further variables for the template (enable_thinking, ...). Raises InvalidRequest when messages
    or variables are not acceptable, when the template refuses them, and when it exceeds its bounds.
    """
    check_messages(messages)
    check_template_kwargs(kwargs)
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InvalidRequest(
            f"the chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARS} are allowed"
        )
    specials = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {
        **kwargs,
        **{name: token for name, token in specials.items() if token is not None},
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps(
            {
                "template": template,
                "variables": variables,
                "max_chars": MAX_OUTPUT_CHARS,
                "cpu_s": MAX_CPU_S,
            }
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages, tools and template variables must be plain JSON data: {error}") from None
    answer = _worker.ask(request.encode("ascii") + b"\n")
    if "text" not in answer:
        raise InvalidRequest(f"chat template: {answer['error']:.500}")
    return answer["text"]


class _Worker:
    """The rendering process. One request at a time; a rendering that exceeds its bounds costs the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes) -> dict[str, str]:
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(request)
                process.stdin.flush()
                line = self._read_line(process, time.monotonic() + MAX_WALL_S)
            except OSError:  # the process died under the write
                line = b""
            except BaseException:  # an interrupt: the answer would be read by the next caller
                self._stop()
                raise
            if line:
                answer: dict[str, str] = json.loads(line)
                return answer
            return {"error": self._cause_of_death(process)}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if self._owner == os.getpid():
            self._stop()
        worker = Path(__file__).with_name("template_worker.py")
        # Isolated mode, and a session of its own: an interrupt at the terminal is the parent's business.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(worker), json.dumps(sys.path), str(MAX_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._owner = os.getpid()
        if self._read_line(self._process, time.monotonic() + MAX_WALL_S) != b"ready\n":
            self._stop()
            raise FastserveError(f"the chat template process could not be started: {sys.executable} {worker}")
        return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """One line; b"" when the process ended or the time is up."""
        assert process.stdout is not None
        fd = process.stdout.fileno()
        waiter = select.poll()  # select() fails above descriptor 1023, which a busy server reaches
        waiter.register(fd, select.POLLIN)
        chunks: list[bytes] = []
        while not chunks or not chunks[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not waiter.poll(left * 1000):
                return b""
            chunk = os.read(fd, 2**20)
            if not chunk:
                return b""
            chunks.append(chunk)
        return b"".join(chunks)

    def _cause_of_death(self, process: subprocess.Popen[bytes]) -> str:
        alive = process.poll() is None and not self._ends_soon(process)
        self._stop()
        if alive:
            return f"no answer within {MAX_WALL_S:g} s"
        if process.returncode == -signal.SIGVTALRM:
            return f"more than {MAX_CPU_S:g} s of processor time needed"
        return "the rendering process ended; the template may need too much memory"

    @staticmethod
    def _ends_soon(process: subprocess.Popen[bytes]) -> bool:
        """Whether the process, whose output has ended, is only about to be reaped."""
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # unwritten bytes for a process that is gone
                pass

    def close(self) -> None:
        with self._lock:
            if self._owner == os.getpid():
                self._stop()


_worker = _Worker()
atexit.register(_worker.close)
