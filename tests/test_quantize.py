# SPDX-License-Identifier: Apache-2.0
"""`fastserve quantize`: the folders it writes, and runs that are killed and taken up again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.cli import main
from fastserve.errors import ModelLoadError
from fastserve.weights import quantize
from fastserve.weights.int8 import round_int8
from fastserve.weights.quantize import QuantizeSettings, quantize_model
from fastserve.weights.round_int4 import FORMS, round_int4
from fastserve.weights.safetensors import open_checkpoint
from tiny_models import TEXT, make_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(folder, num_hidden_layers=3, tie_word_embeddings=True, max_position_embeddings=640)


@pytest.fixture(scope="module")
def text() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 300, (1200,), generator=generator).tolist()


def divergence(folder: Path, exact: Path, prompt: list[int]) -> float:
    """How far the next-token distribution at the end of `prompt` is from the exact model's (KL divergence)."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1)
    tables = []
    for one in (exact, folder):
        with LLM(one, max_logprobs=-1, quantization="none", num_threads=2) as llm:
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        tables.append([row for row in output.prompt_logprobs if row is not None])
    return sum(
        math.exp(entry.logprob) * (entry.logprob - other[token].logprob)
        for row, other in zip(*tables, strict=True)
        for token, entry in row.items()
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_rtn_writes_the_rounded_weights_and_copies_the_rest(
    tiny_dir: Path, tmp_path: Path, form: str, group_size: int
) -> None:
    settings = QuantizeSettings("rtn", form, group_size)
    out = quantize_model(tiny_dir, tmp_path / "out", settings, num_threads=2)
    with open_checkpoint(tiny_dir) as source, open_checkpoint(out) as written:
        name = "model.layers.1.mlp.down_proj"
        expected = round_int4(source.tensor(f"{name}.weight").float(), settings.group_inputs, form)
        quantized = quantize._read_layer(out / quantize._layer_file(1), settings)[name]
        assert torch.equal(quantized.dequantize(), expected.dequantize())
        for kept in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"):
            assert torch.equal(source.tensor(kept), written.tensor(kept))
        assert not any(n.endswith("proj.weight") for n in written)
    with LLM(out, num_threads=2) as llm:
        assert len(llm.generate(["The quick"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == ("fastserve" if form == "minimums" else "compressed-tensors")


@pytest.mark.parametrize("form", ["minimums", "symmetric"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_become_int8_on_request(tmp_path: Path, form: str, tied: bool) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    settings = QuantizeSettings("rtn", form, 64, "int8")
    out = quantize_model(source, tmp_path / "out", settings, num_threads=2)
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        for name in ("model.embed_tokens", "lm_head"):
            assert (f"{name}.weight" in after) == (f"{name}.weight" in before)
            if f"{name}.weight" in after:
                expected = round_int8(before.tensor(f"{name}.weight"), 64)
                assert torch.equal(after.tensor(f"{name}.weight"), expected.codes)
                assert torch.equal(after.tensor(f"{name}.weight_scale"), expected.scales)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "fastserve"
    with LLM(out, num_threads=2) as llm:
        assert len(llm.generate(["The quick"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"])
def test_other_architectures_are_quantised_too(tmp_path: Path, architecture: str, text: list[int]) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", architecture, max_position_embeddings=640)
    out = quantize_model(source, tmp_path / "out", QuantizeSettings("gptq", "minimums", 32), text, num_threads=2)
    with LLM(out, num_threads=2) as llm:
        assert len(llm.generate(["The quick"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_gptq_stays_closer_to_the_model_than_rounding(tiny_dir: Path, tmp_path: Path, text: list[int]) -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        out = quantize_model(
            tiny_dir, tmp_path / method, QuantizeSettings(method, "symmetric", 32), text, num_threads=2
        )
        errors[method] = divergence(out, tiny_dir, text[600:840])
    assert errors["gptq"] < errors["rtn"], errors


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_killed_run_is_taken_up_where_it_was(
    tiny_dir: Path, tmp_path: Path, text: list[int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QuantizeSettings(method, "symmetric", 32)
    whole = quantize_model(tiny_dir, tmp_path / "whole", settings, text, num_threads=2)

    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_dir, tmp_path / "out", settings, text, num_threads=2, progress=killed)
    assert not (tmp_path / "out").exists()
    rounded = []
    real = quantize._Run._round
    monkeypatch.setattr(
        quantize._Run, "_round", lambda self, name, *seen: (rounded.append(name), real(self, name, *seen))[1]
    )
    out = quantize_model(tiny_dir, tmp_path / "out", settings, text, num_threads=2)
    assert {name.split(".")[2] for name in rounded} == {"2"}
    for file in sorted(path.name for path in whole.iterdir()):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_job_begins_anew(tiny_dir: Path, tmp_path: Path) -> None:
    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_dir, tmp_path / "out", QuantizeSettings("rtn", "minimums"), num_threads=2, progress=killed)
    done: list[int] = []
    out = quantize_model(
        tiny_dir,
        tmp_path / "out",
        QuantizeSettings("rtn", "symmetric"),
        num_threads=2,
        progress=lambda d, _: done.append(d),
    )
    assert done == [1, 2, 3]
    with open_checkpoint(out) as written:
        assert not any(name.endswith("weight_minimum") for name in written)


def test_what_cannot_be_is_refused(tiny_dir: Path, tmp_path: Path, text: list[int]) -> None:
    with pytest.raises(ModelLoadError, match="method='best' is not allowed; it is one of rtn, gptq"):
        QuantizeSettings("best")
    with pytest.raises(ModelLoadError, match="group_size=48"):
        QuantizeSettings(group_size=48)
    with pytest.raises(ModelLoadError, match="at least 1024 tokens, got 100"):
        quantize_model(tiny_dir, tmp_path / "out", QuantizeSettings("gptq"), text[:100])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ModelLoadError, match="exists already"):
        quantize_model(tiny_dir, tmp_path / "mine", QuantizeSettings())
    with pytest.raises(ModelLoadError, match="no model folder to replace"):
        quantize_model(tiny_dir, tmp_path / "mine", QuantizeSettings(), force=True)
    out = quantize_model(tiny_dir, tmp_path / "out", QuantizeSettings(), num_threads=2)
    with pytest.raises(ModelLoadError, match="quantised already"):
        quantize_model(out, tmp_path / "again", QuantizeSettings())


def test_the_command_prints_the_perplexity_before_and_after(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXT * 60), encoding="utf-8")
    command = ["quantize", str(tiny_dir), str(tmp_path / "out"), "--method", "gptq", "--text", str(file)]
    assert main([*command, "--calibration-tokens", "1100", "--eval-tokens", "300", "--num-threads", "2"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed
    assert "before," in printed
    assert "300 tokens" in printed
    assert main(command) == 1  # it exists
    assert "--force" in capsys.readouterr().err
