# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the text transformers makes of them, and templates that attack the engine."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fastserve import chat_template
from fastserve.chat_template import RESERVED, check_template_kwargs, render_chat
from fastserve.errors import InvalidRequest
from fastserve.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- set today = today if today is defined else '26 Jul 2024' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|header|>system<|end|>\n\nToday: ' + today + '\n' + system + '<|eot|>' }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- call.function.name }}({{ call.function.arguments | tojson(indent=2) }})
        {%- endfor %}
    {%- else %}
        {{- '<|header|>' + message.role + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end|>\n\n' }}{%- endif %}"""

ALTERNATING = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""

TOOLS = """{%- macro part(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for item in content if item.type == 'text' %}{{- item.text }}{%- endfor %}{%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = index %}{%- set ns.found = true %}{%- continue %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' and loop.previtem and loop.previtem.role != 'tool' %}{{- '<tools>' }}{%- endif %}
    {{- message.role }}@{{ ns.last }}: {% generation %}{{ part(message.content) }}{% endgeneration %}
    {%- if message.content is string and '</think>' in message.content %}
        {{- message.content.split('</think>')[-1].lstrip('\n') }}
    {%- endif %}
    {%- if loop.index > 40 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

USER = {"role": "user", "content": 'What is 2 < 3 & "naïve" 你好 🙂?  '}
SYSTEM = {"role": "system", "content": " Be kind. "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}]}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"b": [1, 2.5], "a": "é<"}}}],
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "It's <b>", "parameters": {"z": {"type": "int"}, "a": None}},
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (CHATML, [USER], {}),
        (CHATML, [SYSTEM, USER, ASSISTANT, USER], {}),
        (HEADERS, [SYSTEM, USER, ASSISTANT], {}),
        (HEADERS, [USER, CALL, USER], {"today": "1 Jan 2031"}),
        (ALTERNATING, [USER, ASSISTANT, USER], {}),
        (TOOLS, [USER, ASSISTANT, PARTS], {"tools": [TOOL, TOOL]}),
        (TOOLS, [USER, {"role": "tool", "content": "5"}, USER], {"tools": [TOOL], "enable_thinking": False}),
        ("{{ missing }}|{{ messages[0].nothing }}|{{ tools }}|{{ documents }}", [USER], {}),
        ("{% set d = dict(a=1) %}{{ d.items() | list }}{{ d | tojson(sort_keys=true) }}", [USER], {}),
        ("a\n  {% if true %}\n  b\n  {% endif %}\n c\n", [USER], {}),
    ],
)
def test_the_same_text_as_transformers(
    template: str, messages: list[Any], options: dict[str, Any], add_generation_prompt: bool
) -> None:
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **specials,
        **options,
    )
    given = render_chat(template, messages, add_generation_prompt=add_generation_prompt, **specials, **options)
    assert given == expected[0]


def test_the_demo_models_template(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(demo_model_dir)
    assert tokenizer.chat_template is not None
    text = render_chat(tokenizer.chat_template, [{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_what_a_template_refuses_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequest, match="chat template: roles must alternate"):
        render_chat(ALTERNATING, [ASSISTANT], bos_token="<s>")


def test_the_date() -> None:
    assert len(render_chat("{{ strftime_now('%Y-%m-%d') }}", [USER])) == 10


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__ }}", "sandbox.*__class__"),
        ("{{ ''['__class__'] }}", "sandbox.*__class__"),
        ("{{ ''|attr('__class__') }}", "sandbox.*__class__"),
        ("{{ messages.__class__.__mro__ }}", "sandbox.*__class__"),
        ("{{ raise_exception.__globals__ }}", "sandbox.*__globals__"),
        ("{{ self.__init__.__globals__ }}", "sandbox.*__init__"),
        ("{{ '{0.__class__}'.format('') }}", "sandbox.*__class__"),
        ("{{ cycler.__init__.__globals__.os }}", "sandbox.*__init__"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "sandbox.*underscore"),
        ("{{ namespace(__class__=1) }}", "sandbox.*underscore"),
        ("{{ messages.append(1) }}", "sandbox.*append"),
        ("{{ messages[0].update(role='x') }}", "sandbox.*update"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ import('os') }}", "undefined"),
        ("{% if", "syntax error in line 1"),
        ("\n{{ 'a' | nofilter }}", "syntax error in line 2: No filter named 'nofilter'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | tojson(indent='x') + 1 }}", "."),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
        ("{% for i in range(10**9) %}a{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "512 MiB of memory"),
        ("{{ 'x' | center(10**10) }}", "512 MiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "512 MiB of memory"),
        ("{{ '{:10000000000}'.format(1) }}", "512 MiB of memory"),
        ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "512 MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "output exceeds 4194304 characters"),
        ("{{ 'a' * 5000000 }}", "output exceeds 4194304 characters"),
        ("x" * (2**20 + 1), "at most 1048576 are allowed"),
    ],
)
def test_attacks_by_template(template: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render_chat(template, [USER])
    assert render_chat("{{ messages[0].role }}", [USER]) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{{ (10 ** 9999999) % 7 }}",  # inside one C call, where no Python code could check a clock
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{% for a in ns.x | tojson %}{% endfor %}",
    ],
    ids=["nested loops", "recursion", "one long operation", "doubling lists"],
)
def test_a_template_that_never_ends_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CPU_S", 0.1)
    with pytest.raises(InvalidRequest, match=r"more than 0\.1 s of processor time|of memory"):
        render_chat(template, [USER])
    monkeypatch.undo()
    assert render_chat("{{ messages[0].role }}", [USER]) == "user"  # a new process answers


@pytest.mark.parametrize("name", [*sorted(RESERVED), "__class__", "_x", "a b", "", "1a"])
def test_reserved_variables(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is reserved or not a name"):
        check_template_kwargs({name: True})


@pytest.mark.parametrize("name", ["tokenize", "template", "messages", "chat_template", "self"])
def test_reserved_variables_when_rendering(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is reserved or not a name"):
        render_chat("x", [USER], **{name: True})


def test_too_many_variables() -> None:
    with pytest.raises(InvalidRequest, match="at most 64"):
        check_template_kwargs({f"v{i}": i for i in range(65)})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (None, "non-empty list"),
        ([{}], r"messages\[0\] must be an object with the string `role`"),
        ([USER, "hi"], r"messages\[1\] must be an object"),
        ([{"role": 1}], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string or a list of parts, got int"),
        ([{"role": "user", "content": "x", "extra": object()}], "plain JSON data"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render_chat(CHATML, messages)


def test_many_threads_get_their_own_answers() -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(20):
            text = render_chat("{{ messages[0].content }}", [{"role": "user", "content": str(number) * 5000}])
            if text != str(number) * 5000:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_process_is_replaced_after_it_died_and_leaves_no_descriptors() -> None:
    assert render_chat("a", [USER]) == "a"
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        process = chat_template._worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert render_chat("b", [USER]) == "b"
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_module_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit")
    chat_template._worker.close()
    monkeypatch.chdir(tmp_path)
    assert "" not in sys.path
    assert render_chat("c", [USER]) == "c"
