# SPDX-License-Identifier: Apache-2.0
"""The process that renders chat templates; started by chat_template.py, never imported by it.

Reads one JSON object per line from stdin, {"template", "variables", "max_chars", "cpu_s"}, and answers each with one
line on stdout, {"text"} or {"error"}. The interpreter of Jinja cannot be bounded from within: a nested loop, a string
multiplied by 10^10 or a list that doubles thirty times is stopped only by the operating system. So this process
limits its own memory, and asks the kernel to end it when one rendering takes too much processor time.
"""

import sys

if __name__ == "__main__":
    import json

    sys.path[:] = json.loads(sys.argv[1])  # started in isolated mode; the parent knows where packages are

import json
import resource
import signal
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """namespace() whose attributes cannot begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError("namespace attributes must not begin with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox lets an unsafe attribute be printed (as nothing); here reaching for one is an error."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.exceptions.SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe"
        )


def make_environment() -> ImmutableSandboxedEnvironment:
    """The dialect of Hugging Face's chat templates."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return make_environment().from_string(template)


def render(template: str, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """{"text"} or {"error"}; a MemoryError passes through."""
    try:
        pieces: list[str] = []
        size = 0
        for piece in _compiled(template).generate(**variables):
            size += len(piece)
            if size > max_chars:
                return {"error": f"the output exceeds {max_chars} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"syntax error in line {error.lineno}: {error.message}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"not allowed in the sandbox: {error}"}
    except RecursionError:
        return {"error": "nested too deeply"}
    except MemoryError:
        raise
    except Exception as error:  # whatever the template's expressions raise
        return {"error": str(error) or type(error).__name__}


def main(max_memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, request["cpu_s"])  # default action: the process ends
        try:
            answer = json.dumps(render(request["template"], request["variables"], request["max_chars"]))
        except MemoryError:
            answer = json.dumps({"error": f"more than {max_memory >> 20} MiB of memory needed"})
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[2]))
