# SPDX-License-Identifier: Apache-2.0
"""GGUF to Hugging Face folder: the demo model still speaks English, and broken files end in a named error."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fastserve.cli import main
from fastserve.errors import ModelLoadError
from fastserve.model_config import ModelConfig
from fastserve.tokenizer import IncrementalDetokenizer, Tokenizer
from fastserve.weights import gguf as gguf_module
from fastserve.weights.gguf import convert_gguf, half_rotation_rows
from fastserve.weights.gguf_blocks import read_int4, read_int8
from fastserve.weights.quantized_checkpoint import QuantizedCheckpoint
from fastserve.weights.safetensors import open_checkpoint
from tiny_models import make_tiny_checkpoint

ENGLISH = (
    "The sun is a star at the center of the solar system. It is a large ball of hot gas, and it gives us "
    "light and heat. The planets, including the Earth, move around the sun. The Earth takes one year to go "
    "around the sun, and it turns once every day. Plants use the light of the sun to grow, and animals eat "
    "the plants. Without the sun, there would be no life on Earth. People have studied the sun for thousands "
    "of years. Today, scientists use telescopes and satellites to learn more about how it works."
)
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 16, 64, 96, 288


def gguf_rows(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Hugging Face's row order to GGUF's: within a head, rows i and i + head_dim/2 become neighbours."""
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous().numpy()


def write_gguf(path: Path, kind: str = "F32", tied: bool = True, **changes: Any) -> dict[str, torch.Tensor]:
    """A tiny random llama GGUF; returns its weights under their Hugging Face names, in Hugging Face order.

    `changes` override metadata (key with dots as double underscores -> value); the value None leaves one out.
    """
    generator = torch.Generator().manual_seed(4)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "model.norm.weight": weight(HIDDEN)}
    layer = {
        "input_layernorm": weight(HIDDEN),
        "self_attn.q_proj": weight(HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": weight(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": weight(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": weight(HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": weight(HIDDEN),
        "mlp.gate_proj": weight(INNER, HIDDEN),
        "mlp.up_proj": weight(INNER, HIDDEN),
        "mlp.down_proj": weight(HIDDEN, INNER),
    }
    tensors |= {f"model.layers.0.{name}.weight": value for name, value in layer.items()}
    if not tied:
        tensors["lm_head.weight"] = weight(VOCAB, HIDDEN)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    names |= {
        f"model.layers.0.{theirs}.weight": f"blk.0.{ours}.weight" for ours, theirs in gguf_module.LAYER_NAMES.items()
    }
    tokens = ["<unk>", "<s>", "</s>", "<tool>", *sorted(gguf_alphabet()), "ab", "abc"]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4)
    metadata: dict[str, Any] = {
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    architecture = changes.pop("architecture", "llama")
    without = changes.pop("without", None)
    extra = changes.pop("extra", None)
    others = changes.pop("others", {})  # last part of a linear's name -> its own type
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    qtype = gguf.GGMLQuantizationType[kind]
    result = {}
    for name, value in tensors.items():
        if name == without:
            continue
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        rows = gguf_rows(value, heads) if heads else value.numpy()
        stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else qtype
        if (last := name.split(".")[-2]) in others:
            stored = gguf.GGMLQuantizationType[others[last]]
        data = gguf.quants.quantize(rows, stored)
        result[name] = torch.from_numpy(gguf.quants.dequantize(data, stored).copy())
        if heads:
            pairs = result[name].reshape(heads, HEAD_DIM // 2, 2, HIDDEN)
            result[name] = torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).reshape(value.shape)
        writer.add_tensor(names[name], data, raw_dtype=stored)
    if extra:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return result


def gguf_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_every_simple_type(tmp_path: Path, kind: str, tied: bool) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind, tied)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32", dequantize=True)
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value), name
    config = ModelConfig.from_dir(folder)
    assert config.tie_word_embeddings == tied
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.rms_norm_eps, config.rope.theta, config.torch_dtype) == (1e-5, 50000.0, "float32")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert tokenizer.encode("abc<tool>12")[0] == 1  # add_bos_token
    assert tokenizer.decode(tokenizer.encode("abc<tool></s>12")) == "abc<tool>12"


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder in float32 under their dense names, quantised ones dequantised."""
    config = ModelConfig.from_dir(folder)
    assert config.quantization is not None
    checkpoint = open_checkpoint(folder)
    quantized = QuantizedCheckpoint(checkpoint, config.quantization)
    result = {name: checkpoint.tensor(name).float() for name in checkpoint.names() if name.endswith(".weight")}
    for name in list(result):
        if quantized.holds_int8(name.removesuffix(".weight")):
            result[name] = quantized.read_int8(name.removesuffix(".weight"), *checkpoint.shape(name)).dequantize()
    for name in checkpoint.names():
        if name.endswith(".weight_shape"):
            linear = name.removesuffix(".weight_shape")
            result[f"{linear}.weight"] = quantized.read(linear, *checkpoint.tensor(name).tolist()).dequantize()
    return result


@pytest.mark.parametrize(
    ("kinds", "num_int4", "int8", "method"),
    [
        ({"kind": "Q4_0"}, 7, [], "compressed-tensors"),
        ({"kind": "Q4_1"}, 7, [], "fastserve"),
        ({"kind": "Q4_1", "others": {"v_proj": "Q4_0"}}, 7, [], "fastserve"),
        ({"kind": "Q4_0", "others": {"v_proj": "Q8_0"}}, 4, [], "compressed-tensors"),
        ({"kind": "Q4_1", "others": {"down_proj": "Q5_0", "up_proj": "Q8_0"}}, 4, [], "fastserve"),
        ({"kind": "Q4_0", "others": {"embed_tokens": "Q8_0"}}, 7, ["embed_tokens"], "fastserve"),
        ({"kind": "Q4_1", "others": {"down_proj": "Q8_0", "lm_head": "Q8_0"}}, 6, ["down_proj", "lm_head"],
         "fastserve"),
        ({"kind": "Q8_0", "others": {"k_proj": "F16"}}, 0,
         ["down_proj", "embed_tokens", "gate_proj", "lm_head", "o_proj", "up_proj"], "fastserve"),
    ],
)  # fmt: skip
def test_quantised_weights_stay_as_they_are(
    tmp_path: Path, kinds: dict[str, Any], num_int4: int, int8: list[str], method: str
) -> None:
    """The file's own values to the last bit, from the codes and scales of the file; projections that an engine joins
    are kept together or not at all."""
    expected = write_gguf(tmp_path / "m.gguf", tied=False, **kinds)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    weights = dense(folder)
    assert sorted(weights) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    checkpoint = open_checkpoint(folder)
    packed = [name for name in checkpoint.names() if name.endswith("weight_packed")]
    assert len(packed) == num_int4
    assert sorted(n.split(".")[-2] for n in checkpoint.names() if checkpoint.dtype(n) == torch.int8) == int8
    if method == "compressed-tensors":
        ignored = config["quantization_config"]["ignore"]
        assert ignored == ["lm_head", *sorted(ignored[1:], key=ignored.index)]
        assert len(ignored) == 1 + 7 - num_int4
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "dense"), "--dequantize"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_block_is_what_its_description_says() -> None:
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, (2, 3 * 20), dtype=np.uint8)
    data.reshape(2, 3, 20)[:, :, :4] = generator.random((2, 3, 2)).astype(np.float16).view(np.uint8)
    weight = read_int4(data, "Q4_1", 2, 96).dequantize()
    for row in range(2):
        for block in range(3):
            content = data[row, 20 * block : 20 * block + 20].tobytes()
            scale, minimum = struct.unpack("<ee", content[:4])
            for i in range(32):
                code = content[4 + i % 16] >> (4 if i >= 16 else 0) & 15
                assert float(weight[row, 32 * block + i]) == np.float32(scale) * code + np.float32(minimum)


def test_an_8_bit_block_is_what_its_description_says() -> None:
    generator = np.random.default_rng(4)
    data = generator.integers(0, 256, (2, 3 * 34), dtype=np.uint8)
    data.reshape(2, 3, 34)[:, :, :2] = generator.random((2, 3, 1)).astype(np.float16).view(np.uint8)
    weight = read_int8(data, 2, 96).dequantize()
    for row in range(2):
        for block in range(3):
            scale, *codes = struct.unpack("<e32b", data[row, 34 * block : 34 * block + 34].tobytes())
            assert weight[row, 32 * block : 32 * block + 32].tolist() == [np.float32(scale) * code for code in codes]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantised_weights_that_are_not_finite(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", kind)
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]  # the last one begins with its scale
    content[-block : -block + 2] = struct.pack("<e", math.nan)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"m\.gguf: tensor 'blk\.0\.ffn_down\.weight': scales hold NaN"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_the_same_weights_as_transformers_reads_from_the_file(tmp_path: Path) -> None:
    """transformers reads GGUF by its own code, with its own un-permutation of the rows."""
    write_gguf(tmp_path / "m.gguf", "Q8_0")
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32", dequantize=True)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=ours)["tensors"]
    state = ours.state_dict()
    assert {*theirs, "lm_head.weight"} == set(state)
    for name, value in theirs.items():
        assert torch.equal(state[name], torch.as_tensor(value)), name


def test_the_order_of_the_rows() -> None:
    rows = torch.arange(32.0)[:, None]  # two heads of 16
    expected = [*range(0, 16, 2), *range(1, 16, 2), *range(16, 32, 2), *range(17, 32, 2)]
    assert half_rotation_rows(rows, 16)[:, 0].tolist() == expected


def test_sharded_when_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_module, "MAX_SHARD_BYTES", 30_000)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    assert len(list(folder.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(folder)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value)


def test_a_folder_is_replaced_only_when_told_and_only_if_it_is_a_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    out = tmp_path / "deep" / "out"
    convert_gguf(tmp_path / "m.gguf", out)
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(ModelLoadError, match="exists already; --force"):
        convert_gguf(tmp_path / "m.gguf", out)
    convert_gguf(tmp_path / "m.gguf", out, force=True)
    assert sorted(path.name for path in out.parent.iterdir()) == before == ["out"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ModelLoadError, match="no model folder to replace"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "photos", force=True)
    with pytest.raises(ModelLoadError, match="not a folder"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "m.gguf", force=True)


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")

    def full_disk(done: int, total: int, name: str) -> None:
        if done == total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", progress=full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture must be one of llama, got 'qwen2'"),
        ({"llama__block_count": None}, "llama.block_count must be an integer"),
        ({"llama__block_count": 2}, r"tensor 'blk\.1\.attn_norm\.weight' is missing"),
        ({"llama__embedding_length": 32}, r"must have shape .*got"),
        ({"llama__attention__head_count": 0}, "head_count must be"),
        ({"llama__attention__head_count_kv": 3}, "must have shape"),
        ({"llama__attention__value_length": 8}, "value_length must be the head dimension"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type must be one of none, linear"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "epsilon must be a number"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model must be one of gpt2"),
        ({"tokenizer__ggml__pre": "tekken"}, "tokenizer.ggml.pre must be one of gpt-2, smollm"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "token_type must be an array of 2"),
        ({"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]}, "different tokens"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokenizer__ggml__merges": ["a nothing"]}, "merge 'a nothing' names tokens outside"),
        ({"tokenizer__ggml__bos_token_id": 10**6}, "bos_token_id must be an integer from 0 to 287"),
        ({"without": "model.norm.weight"}, r"tensor 'output_norm\.weight' is missing"),
        ({"extra": "rope_freqs.weight"}, r"tensor 'rope_freqs\.weight' has no place"),
        ({"extra": "blk.0.attn_q.bias"}, r"tensor 'blk\.0\.attn_q\.bias' has no place"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(ModelLoadError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-4:] = struct.pack("<f", math.inf)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="not finite"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def header(fields: bytes = b"", num_fields: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + fields + tensors


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t", claim: int | None = None) -> bytes:
    count = len(dims) if claim is None else claim
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"GGUX" + bytes(40), "not a GGUF file: it begins with b'GGUX'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1 is not known"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version 50331648 is not known"),
        (header(num_fields=2**63), "the number of fields is"),
        (header(num_tensors=2**60), "the number of tensors is"),
        (header(num_fields=1), "which the file does not have"),
        (header(field(b"k" * 2000, 4, bytes(4)), 1), "the length of a field's name is 2000"),
        (header(field(b"\xff", 4, bytes(4)), 1), "not UTF-8"),
        (header(field(b"k", 99, bytes(8)), 1), "unknown value type 99"),
        (header(field(b"k", 8, struct.pack("<Q", 2**40)), 1), "length of field 'k' is"),
        (header(field(b"k", 9, struct.pack("<IQ", 0, 2**60)), 1), "number of elements of field 'k' is"),
        (
            header(field(b"k", 9, struct.pack("<IQ", 0, 2**20)), 1),
            "takes 1048576 bytes, which the file does not",
        ),
        (header(field(b"k", 9, struct.pack("<IQ", 8, 2**20)), 1), "which the file does not have"),
        (header(field(b"k", 9, struct.pack("<IQIQ", 9, 1, 9, 1)), 1), "array of value type 9"),
        (header(field(b"general.alignment", 4, struct.pack("<I", 24)), 1), "power of two"),
        (header(field(b"general.alignment", 4, struct.pack("<I", 0)), 1), "power of two"),
        (header(tensors=tensor([4], claim=2**31), num_tensors=1) + bytes(99), "dimensions, 1 to 4"),
        (header(tensors=tensor([4], kind=77), num_tensors=1) + bytes(99), "unknown tensor type 77"),
        (header(tensors=tensor([2**63]), num_tensors=1) + bytes(99), "a dimension of tensor 't' is"),
        (
            header(tensors=tensor([2**33, 2**33, 2]), num_tensors=1) + bytes(99),
            "of .* data bytes; is the file",
        ),
        (header(tensors=tensor([33], kind=8), num_tensors=1) + bytes(99), "fill blocks of 32"),
        (header(tensors=tensor([0]), num_tensors=1) + bytes(99), "rows of 0 elements"),
        (header(tensors=tensor([4], offset=2**50), num_tensors=1) + bytes(99), "the offset of tensor 't' is"),
        (header(tensors=tensor([4], offset=64), num_tensors=1) + bytes(40), r"spans \[64, 80\)"),
        (
            header(tensors=tensor([8]) + tensor([8], name=b"u"), num_tensors=2) + bytes(99),
            "'u' begins at 0, inside 't'",
        ),
    ],
)
def test_lying_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    """Whatever byte is cut or changed: a folder or a ModelLoadError, nothing else, and no endless loop."""
    write_gguf(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    data_start = len(whole) - 4 * 45_000
    rng = random.Random(2)
    broken = tmp_path / "broken.gguf"
    contents = [whole[: rng.randrange(len(whole))] for _ in range(40)]
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(data_start)] = rng.randrange(256)
        contents.append(bytes(content))
    refused = 0
    for content in contents:
        broken.write_bytes(content)
        try:
            convert_gguf(broken, tmp_path / "out", force=True)
        except ModelLoadError:
            refused += 1
    assert refused >= 40


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'fastserve\[convert\]'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf")
    arguments = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(arguments) == 1
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.gguf"), str(tmp_path / "out2")]) == 1
    assert "none.gguf: does not exist" in capsys.readouterr().err


# The demo model itself.


def test_the_demo_model_speaks_english(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(demo_model_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(ENGLISH)])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
        prompt = torch.tensor([tokenizer.encode("The capital of France is")])
        answer = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    # Rows in the wrong order for RoPE give thousands.
    assert math.exp(loss) < 15
    assert "Paris" in tokenizer.decode(answer)


def test_the_demo_tokenizer(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(demo_model_dir)
    reference = AutoTokenizer.from_pretrained(demo_model_dir)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (49152, 1, 2)
    texts = [ENGLISH, "12345 + 67 = 3.14", "naïve café, Straße", "你好,世界", "🙂 👩‍👩‍👧", "\t\n  x  \n", ""]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("In 2024")] == ["In", " ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user") == [1, tokenizer.token_to_id("user")]


def test_incremental_decoding_with_the_demo_tokenizer(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(demo_model_dir)
    rng = random.Random(7)
    for skip in (True, False):
        for _ in range(200):
            ids = [rng.randrange(49152 + 10) for _ in range(rng.randrange(60))]
            stream = IncrementalDetokenizer(tokenizer, skip)
            text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
            assert text == tokenizer.decode(ids, skip)


def test_tiny_checkpoints_are_no_gguf(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        convert_gguf(folder / "model.safetensors", tmp_path / "out")
