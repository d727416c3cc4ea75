# SPDX-License-Identifier: Apache-2.0
"""The command line: fast version, clear errors, and the commands on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastserve
from fastserve.cli import main
from tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_version_and_help_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from fastserve.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'jinja2', 'fastserve._native'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"fastserve {fastserve.__version__}"


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, fastserve; from fastserve import SamplingParams, RequestOutput; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_prints_json_for_each_prompt(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        str(tiny_dir),
        "-p",
        "The quick",
        "-p",
        "A river",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
    ]
    assert main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["The quick", "A river"]
    assert all(row["completion_tokens"] <= 5 for row in rows)
    assert main(arguments) == 0
    assert "The quick" + rows[0]["text"] in capsys.readouterr().out


def test_generate_reads_prompts_from_a_file(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    assert main(["generate", str(tiny_dir), "-f", str(tmp_path / "prompts"), "--max-tokens", "2", "--json"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_generate_without_a_prompt_is_wrong_usage(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_dir)]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_chat_answers_each_line(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Why?", "And then?"])

    def read(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(tiny_dir), "--max-tokens", "4", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.strip("\n").split("\n")) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/nowhere", "-p", "a"], "nowhere"),
        (["generate", "MODEL", "-p", "a", "--max-model-len", "1"], "max_model_len"),
        (["generate", "MODEL", "-p", "a", "--temperature", "nan"], "temperature"),
        (["generate", "MODEL", "-p", "a", "--dtype", "int3"], "dtype"),
        (["generate", "MODEL", "-p", ""], "empty"),
        (["convert", "/nowhere.gguf", "OUT"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    tiny_dir: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(tiny_dir), "OUT": str(tmp_path / "out")}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastserve: ")
    assert message in error
    assert "Traceback" not in error


def test_doctor_names_instruction_sets_and_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from fastserve import _native

    assert main(["doctor", "--ops"]) == 0
    text = capsys.readouterr().out
    assert _native.isa() in text
    assert all(f"| {op['op']} |" in text for op in _native.op_table())
