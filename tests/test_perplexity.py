# SPDX-License-Identifier: Apache-2.0
"""Perplexity equals what transformers' logits give, for any way of cutting the text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve import LLM, FastserveError, InvalidRequest
from fastserve.cli import main
from fastserve.evaluate import measure_perplexity, read_text_tokens, windows
from tiny_models import TEXT, make_tiny_checkpoint

LONG_TEXT = "\n".join(TEXT * 6)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LONG_TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, max_model_len=128, max_num_batched_tokens=48, num_threads=2) as llm:
        yield llm


def reference_nats(folder: Path, tokens: list[int], context: int, stride: int) -> tuple[int, float]:
    """The strided recipe in plain code: labels of tokens that were scored before are left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    count, nats, previous_end = 0, 0.0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens[begin:end]])).logits[0].double()
        for position in range(max(begin + 1, previous_end), end):
            nats -= float(logits[position - 1 - begin].log_softmax(-1)[tokens[position]])
            count += 1
        previous_end = end
        if end == len(tokens):
            break
    return count, nats


@pytest.mark.parametrize(("context", "stride"), [(100, 100), (64, 16), (127, 50), (2, 1)])
def test_the_same_as_transformers(llm: LLM, tiny_dir: Path, text_file: Path, context: int, stride: int) -> None:
    tokens = read_text_tokens(llm, text_file, 60 if context == 2 else 300)
    seen: list[tuple[int, int]] = []
    result = measure_perplexity(
        llm, tokens, context=context, stride=stride, progress=lambda done, total: seen.append((done, total))
    )
    count, nats = reference_nats(tiny_dir, tokens, context, stride)
    assert result.num_tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert seen[-1] == (count, count)


@pytest.mark.parametrize(("num_tokens", "context", "stride"), [(100, 10, 10), (101, 10, 10), (57, 16, 5), (9, 10, 3)])
def test_windows_score_a_token_once_with_the_promised_context(num_tokens: int, context: int, stride: int) -> None:
    scored: list[int] = []
    for window in windows(num_tokens, context, stride):
        assert window.end - window.begin <= context
        scored += range(window.first_scored, window.end)
        assert window.begin == 0 or window.first_scored - window.begin >= max(1, context - stride)
    skipped = set(range(0, num_tokens, stride)) if stride == context else {0}
    assert sorted(scored) == [i for i in range(num_tokens) if i not in skipped]
    assert len(set(scored)) == len(scored)


def test_sizes_that_cannot_be(llm: LLM, tmp_path: Path) -> None:
    for options, message in (
        ({"context": 128}, "context=128 is not allowed; this engine takes 2 to 127"),
        ({"context": 1}, "context=1 is not allowed"),
        ({"context": 8, "stride": 9}, "stride=9 is not allowed; it is 1 to context=8"),
        ({"stride": 0}, "stride=0 is not allowed"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            measure_perplexity(llm, list(range(20)), **options)
    with pytest.raises(InvalidRequest, match="at least 2 are needed"):
        measure_perplexity(llm, [3])
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(FastserveError, match=r"binary: not a text in UTF-8 \(byte 2\)"):
        read_text_tokens(llm, tmp_path / "binary")


def test_the_command_prints_tokens_perplexity_and_speed(
    tiny_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "perplexity", str(tiny_dir), "--text", str(text_file), "--max-tokens", "90"]
    assert main([*arguments, "--context", "40"]) == 0
    found = re.fullmatch(r"tokens (\d+)  perplexity ([\d.]+)  \d+ tok/s\n", capsys.readouterr().out)
    assert found
    assert int(found[1]) == 87
    assert main(["eval", "perplexity", str(tiny_dir), "--text", "nowhere.txt"]) == 1
    assert "nowhere.txt: does not exist" in capsys.readouterr().err
