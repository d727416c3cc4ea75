# SPDX-License-Identifier: Apache-2.0
"""`fastserve convert model.gguf DIR`: a Hugging Face folder made of a GGUF file.

The folder gets config.json, safetensors, tokenizer.json, tokenizer_config.json with the chat template, and
generation_config.json. Matrices in Q4_0, Q4_1 and Q8_0 keep their codes and scales (docs/quantization.md); everything
else is dequantised, to bf16 by default. The `gguf` library reads and dequantises; ours are the checks, the names, the
row order of the query and key weights, and the tokenizer. What cannot be converted faithfully is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.errors import ModelLoadError
from fastserve.json_file import Fields
from fastserve.weights.gguf_header import check_gguf

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]  # (tensors done, tensors in all, name)

DTYPES = ("bfloat16", "float16", "float32")
MAX_SHARD_BYTES = 4 * 2**30
ARCHITECTURE = "llama"
PRE_TOKENIZERS = ("gpt-2", "smollm")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of token in tokenizer.ggml.token_type

# GGUF name -> Hugging Face name, of each layer and of the whole model.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _GgufModel:
    """One GGUF file: its metadata as typed fields, and its tensors under their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ModelLoadError(
                "converting a GGUF file needs the gguf package: pip install 'fastserve[convert]'"
            ) from None
        check_gguf(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
        try:
            reader = gguf.GGUFReader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the library raises whatever its numpy calls raise
            raise ModelLoadError(f"{path}: the gguf library cannot read it: {error}") from error
        self.path = path
        self.fields = Fields(str(path), metadata)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.quants.dequantize
        self.fields.choice("general.architecture", (ARCHITECTURE,))
        if self.integer("expert_count", 0, 2**20, 0):
            raise self.fields.error(f"{ARCHITECTURE}.expert_count", "0 (mixtures of experts are not converted)")
        self.hidden_size = self.integer("embedding_length", 1, 2**20)
        self.intermediate_size = self.integer("feed_forward_length", 1, 2**20)
        self.num_layers = self.integer("block_count", 1, 4096)
        self.num_heads = self.integer("attention.head_count", 1, 2**14)
        self.num_kv_heads = self.integer("attention.head_count_kv", 1, 2**14, self.num_heads)
        self.head_dim = self.integer("attention.key_length", 2, 4096, self.hidden_size // self.num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, 1, 2**20, self.head_dim) != self.head_dim:
                raise self.fields.error(f"{ARCHITECTURE}.{key}", f"the head dimension ({self.head_dim})")
        vocab = self.tensors.get("token_embd.weight")
        self.vocab_size = int(vocab.shape[-1]) if vocab is not None else 0
        self.tied = "output.weight" not in self.tensors
        self.plan = self._plan()

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        return self.fields.integer(f"{ARCHITECTURE}.{key}", low, high, default)

    def _plan(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face name -> (GGUF name, shape); every tensor of the file is in it, or it is an error."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,)),
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, q),
            "ffn_down": (hidden, inner),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (inner, hidden)),
        }
        table = (self.vocab_size, hidden)
        plan: dict[str, tuple[str, tuple[int, ...]]] = {
            "model.embed_tokens.weight": ("token_embd.weight", table),
            "model.norm.weight": ("output_norm.weight", (hidden,)),
        }
        if not self.tied:
            plan["lm_head.weight"] = ("output.weight", table)
        for layer in range(self.num_layers):
            for short, name in LAYER_NAMES.items():
                plan[f"model.layers.{layer}.{name}.weight"] = (f"blk.{layer}.{short}.weight", shapes[short])
        for name, shape in plan.values():
            if name not in self.tensors:
                raise ModelLoadError(f"{self.path}: tensor {name!r} is missing")
            given = tuple(reversed([int(size) for size in self.tensors[name].shape]))
            if given != shape:
                raise ModelLoadError(f"{self.path}: tensor {name!r} must have shape {shape}, got {given}")
        unexpected = sorted(set(self.tensors) - {name for name, _ in plan.values()})
        if unexpected:
            raise ModelLoadError(
                f"{self.path}: tensor {unexpected[0]!r} has no place in a plain Llama model "
                f"({len(unexpected)} such tensors); biases, experts and frequency factors are not converted"
            )
        return plan

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor of this Hugging Face name, dequantised in fp32 and then rounded once."""
        import torch

        source, shape = self.plan[name]
        tensor = self.tensors[source]
        try:
            values = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:  # how the library says that it only stores this type
            raise ModelLoadError(
                f"{self.path}: tensor {source!r} has type {tensor.tensor_type.name}, "
                "which the gguf library cannot dequantise"
            ) from None
        values = values.to(torch.float32).reshape(shape)
        if not bool(torch.isfinite(values.sum())):  # a sum keeps every infinity and NaN, and is fast
            raise ModelLoadError(f"{self.path}: tensor {source!r} holds values that are not finite")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = half_rotation_rows(values, self.head_dim)
        return values.to(dtype).contiguous()

    def kept_kinds(self) -> dict[str, str]:
        """The matrices that stay as they are stored, see gguf_blocks."""
        from fastserve.weights.gguf_blocks import kept_kinds

        kinds = {name: self.tensors[source].tensor_type.name for name, (source, _) in self.plan.items()}
        return kept_kinds(kinds)

    def kept_tensors(self, matrix: str, kind: str) -> dict[str, torch.Tensor]:
        """The tensors of a matrix that stays as it is, in the form of `kind`, by their full names."""
        from fastserve.weights.gguf_blocks import read_int4, read_int8, with_minimums
        from fastserve.weights.quantized_checkpoint import pack_int8, pack_quantized

        source, (num_rows, depth) = self.plan[f"{matrix}.weight"]
        tensor, where = self.tensors[source], f"{self.path}: tensor {source!r}"
        if kind == "Q8_0":
            int8 = read_int8(tensor.data, num_rows, depth)
            int8.check(where)
            tensors = pack_int8(int8)
        else:
            weight = read_int4(tensor.data, tensor.tensor_type.name, num_rows, depth)
            if kind == "Q4_1":
                weight = with_minimums(weight)
            weight.check(where)
            tensors = pack_quantized(weight)
        if matrix.endswith(("q_proj", "k_proj")):
            tensors |= {
                part: half_rotation_rows(value, self.head_dim)
                for part, value in tensors.items()
                if part != "weight_shape"
            }
        return {f"{matrix}.{part}": value.contiguous() for part, value in tensors.items()}

    def token(self, key: str) -> tuple[int, str] | None:
        """(id, text) of a special token that the metadata names by id."""
        found = self.fields.optional_integer(f"tokenizer.ggml.{key}", 0, self.vocab_size - 1)
        tokens = self.fields.data.get("tokenizer.ggml.tokens", [])
        return None if found is None or found >= len(tokens) else (found, tokens[found])


def half_rotation_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads * head_dim, in] from GGUF's order to Hugging Face's.

    RoPE turns pairs of elements. GGUF's llama puts the two of a pair side by side (2i, 2i + 1), Hugging Face
    half a head apart (i, i + head_dim / 2). With the wrong order the model still runs, and talks nonsense.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _config(model: _GgufModel, dtype: str, kept: dict[str, str]) -> dict[str, Any]:
    fields = model.fields
    scaling = fields.choice(f"{ARCHITECTURE}.rope.scaling.type", ("none", "linear"), "none")
    factor = fields.number(f"{ARCHITECTURE}.rope.scaling.factor", 1.0, 1e6, 1.0)
    theta = fields.number(f"{ARCHITECTURE}.rope.freq_base", 1.0, 1e15, 10_000.0)
    eps = fields.number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1e-12, 1.0)
    bos, eos = model.token("bos_token_id"), model.token("eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.integer("context_length", 1, 2**31 - 1),
        "rms_norm_eps": _shortest_fp32(eps),
        "rope_theta": _shortest_fp32(theta),
        "rope_scaling": {"type": "linear", "factor": factor} if scaling == "linear" and factor != 1.0 else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos[0] if eos else None,
        "torch_dtype": dtype,
        **({"quantization_config": _quantization_config(model, kept)} if kept else {}),
    }


def _quantization_config(model: _GgufModel, kept: dict[str, str]) -> dict[str, Any]:
    """compressed-tensors' where that format can say it, for other engines to read; ours where there are minimums or
    int8 matrices."""
    from fastserve.weights.gguf_blocks import BLOCK
    from fastserve.weights.quantization_config import compressed_tensors_config, fastserve_config

    if set(kept.values()) != {"Q4_0"}:
        return fastserve_config(BLOCK, 8 if set(kept.values()) == {"Q8_0"} else 4)
    linears = (name.removesuffix(".weight") for name in model.plan if name.endswith("_proj.weight"))
    return compressed_tensors_config(BLOCK, True, [name for name in linears if name not in kept])


def _shortest_fp32(value: float) -> float:
    """GGUF stores fp32, so 1e-05 reads as 9.99999974e-06: the shortest decimal of the same fp32."""
    import numpy as np

    return float(np.format_float_scientific(np.float32(value)))


def _strings(fields: Fields, key: str) -> list[str]:
    value = fields.data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fields.error(key, "an array of strings")
    return value


def _write_tokenizer(model: _GgufModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, for a byte-level BPE vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = model.fields
    fields.choice("tokenizer.ggml.model", ("gpt2",))  # byte-level BPE; SentencePiece vocabularies are "llama"
    pre = fields.choice("tokenizer.ggml.pre", PRE_TOKENIZERS, "gpt-2")
    tokens, merges = _strings(fields, "tokenizer.ggml.tokens"), _strings(fields, "tokenizer.ggml.merges")
    kinds = fields.data.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise fields.error("tokenizer.ggml.token_type", f"an array of {len(tokens)} numbers, one per token")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(tokens) > model.vocab_size:
        raise ModelLoadError(
            f"{model.path}: tokenizer.ggml.tokens must be at most {model.vocab_size} different tokens, "
            f"got {len(tokens)} with {len(vocab)} different ones"
        )
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelLoadError(f"{model.path}: merge {merge!r:.200} names tokens outside the vocabulary")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    specials = {name: model.token(f"{key}_token_id") for key, name in names.items()}
    template = fields.data.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise fields.error("tokenizer.chat_template", "a string")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": fields.boolean("tokenizer.ggml.add_bos_token", False),
        "add_eos_token": fields.boolean("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.integer("context_length", 1, 2**31 - 1),
        **{name: token[1] for name, token in specials.items() if token is not None},
        **({"chat_template": template} if template is not None else {}),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(model: _GgufModel, dtype: torch.dtype, kept: dict[str, str]) -> Iterator[list[str]]:
    """The tensor names in groups of at most MAX_SHARD_BYTES (a larger tensor alone)."""
    bits = {"Q4_0": 5, "Q4_1": 5, "Q8_0": 9}  # of a weight with its share of scales, rounded up
    group: list[str] = []
    group_bytes = 0
    for name, (_, shape) in model.plan.items():
        kind = kept.get(name.removesuffix(".weight"))
        num_bytes = math.prod(shape) * dtype.itemsize if kind is None else math.prod(shape) * bits[kind] // 8 + 16
        if group and group_bytes + num_bytes > MAX_SHARD_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += num_bytes
    yield group


def _write_weights(
    model: _GgufModel, folder: Path, dtype: torch.dtype, kept: dict[str, str], progress: Progress | None
) -> None:
    from safetensors.torch import save_file

    groups = list(_shards(model, dtype, kept))
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    weight_map: dict[str, str] = {}
    done = 0
    for file, group in zip(files, groups, strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for name in group:
            matrix = name.removesuffix(".weight")
            if matrix in kept:
                tensors |= model.kept_tensors(matrix, kept[matrix])
            else:
                tensors[name] = model.tensor(name, dtype)
            done += 1
            if progress is not None:
                progress(done, len(model.plan), name)
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # The library writes for the owner only.
        (folder / file).chmod((folder / "config.json").stat().st_mode & 0o777)
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _verify(folder: Path) -> None:
    """What was written must be readable by the readers it was written for."""
    from fastserve.model_config import ModelConfig
    from fastserve.tokenizer import Tokenizer
    from fastserve.weights.safetensors import open_checkpoint

    ModelConfig.from_dir(folder)
    Tokenizer.from_dir(folder)
    open_checkpoint(folder).close()


def convert_gguf(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "bfloat16",
    dequantize: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a GGUF file to a Hugging Face folder and return the folder.

    Linears in Q4_0, Q4_1 and Q8_0, and embeddings and heads in Q8_0, stay so, code for code, unless `dequantize`; all
    other weights become `dtype`.
    The folder appears complete or not at all. An existing one is replaced only with force=True, and only if
    it is empty or a model folder. Raises ModelLoadError for a file that cannot be converted faithfully.
    """
    import torch

    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    out = Path(os.path.abspath(out_dir))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ModelLoadError(f"{out}: exists and is not a folder")
    occupied = out.exists() and any(out.iterdir())
    if occupied and not force:
        raise ModelLoadError(f"{out}: exists already; --force replaces it")
    if occupied and not (out / "config.json").exists():
        raise ModelLoadError(f"{out}: exists and holds no config.json, so it is no model folder to replace")
    model = _GgufModel(Path(path))
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent, so that renaming it into place is one step on one file system.
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder = workspace / "new"
        folder.mkdir()
        kept = {} if dequantize else model.kept_kinds()
        _write_json(folder / "config.json", _config(model, dtype, kept))
        ids = {key: model.token(key) for key in ("bos_token_id", "eos_token_id", "padding_token_id")}
        named = {key.replace("padding", "pad"): token[0] for key, token in ids.items() if token is not None}
        _write_json(folder / "generation_config.json", named)
        _write_tokenizer(model, folder)
        _write_weights(model, folder, getattr(torch, dtype), kept, progress)
        _verify(folder)
        if out.exists():
            out.rename(workspace / "old")
        folder.rename(out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return out
