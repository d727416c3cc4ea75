# SPDX-License-Identifier: Apache-2.0
"""What a model folder's config.json says, checked and in one spelling.

The file is data from strangers: nothing in it (auto_map, custom classes) is ever imported, every size has a
type and a bound, and a feature that this engine does not compute is an error, never ignored: a model that
runs with a missing feature produces plausible nonsense. Both spellings in use are read, that of transformers
4 (rope_theta, rope_scaling, torch_dtype) and that of transformers 5 (rope_parameters, dtype).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.errors import ModelLoadError
from fastserve.json_file import Fields, read_json_object
from fastserve.weights.quantization_config import QuantizationConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("float32", "float16", "bfloat16")
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_CONFIG_BYTES = 16 * 2**20

MAX_WIDTH = 2**20  # of hidden and intermediate vectors; the largest in use are below 2**18
MAX_LAYERS = 4096
MAX_HEADS = 2**14
MAX_HEAD_DIM = 2**12
MAX_VOCAB = 2**24
MAX_POSITIONS = 2**31 - 1  # positions are 32-bit integers in the engine

# Which scaling parameters each RoPE type takes, beside rope_type and rope_theta.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
ROPE_NOTES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `type` is a key of ROPE_KEYS and decides which of the other fields count."""

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None  # None: derived from factor and mscale
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampling defaults of generation_config.json; None where the model's authors gave none."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_fields(cls, more: Fields) -> GenerationDefaults:
        return cls(
            temperature=more.optional_number("temperature", 0.0, 1e4),
            top_k=more.optional_integer("top_k", -1, MAX_VOCAB),
            top_p=more.optional_number("top_p", 0.0, 1.0),
            min_p=more.optional_number("min_p", 0.0, 1.0),
            repetition_penalty=more.optional_number("repetition_penalty", 1e-3, 1e3),
            max_new_tokens=more.optional_integer("max_new_tokens", 1, MAX_POSITIONS),
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family. Widths count elements."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]  # per layer: a query sees its last N tokens, itself included; None: all
    torch_dtype: str | None  # "float32", "float16" or "bfloat16"; None when config.json does not say
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # generation_config.json's where it names any, else config.json's
    generation: GenerationDefaults
    quantization: QuantizationConfig | None  # None: no weight is int4

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that have one (all layers with a window share its size)."""
        return next((window for window in self.layer_windows if window is not None), None)

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> ModelConfig:
        """Read config.json and, if there, generation_config.json; raises ModelLoadError."""
        folder = Path(model_dir)
        if not folder.is_dir():
            raise ModelLoadError(f"{folder}: not a folder; a model is a folder with {CONFIG_FILE} and weights")
        path = folder / CONFIG_FILE
        config = read_json_object(path, MAX_CONFIG_BYTES, allow_nan=True)
        generation: dict[str, Any] = {}
        if (folder / GENERATION_FILE).exists():
            generation = read_json_object(folder / GENERATION_FILE, MAX_CONFIG_BYTES, allow_nan=True)
        return cls.from_dicts(config, generation, str(path), str(folder / GENERATION_FILE))

    @classmethod
    def from_dicts(
        cls,
        config: dict[str, Any],
        generation: dict[str, Any] | None = None,
        where: str = CONFIG_FILE,
        generation_where: str = GENERATION_FILE,
    ) -> ModelConfig:
        """The same from parsed JSON objects; `where` and `generation_where` name the sources in errors."""
        fields = Fields(where, config)
        more = Fields(generation_where, generation or {})
        architecture = _architecture(fields)
        _refuse_unsupported(fields, architecture)
        num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB)
        positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
        num_heads, num_kv_heads, head_dim = _heads(fields, architecture)
        attention_bias = fields.boolean("attention_bias", architecture == "Qwen2ForCausalLM")
        bos = fields.token_ids("bos_token_id", vocab_size)
        eos = more.token_ids("eos_token_id", vocab_size) or fields.token_ids("eos_token_id", vocab_size)
        return cls(
            architecture=architecture,
            hidden_size=fields.integer("hidden_size", 1, MAX_WIDTH),
            intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
            rope=_rope(fields, positions),
            max_position_embeddings=positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias,
            o_bias=attention_bias and architecture != "Qwen2ForCausalLM",
            mlp_bias=fields.boolean("mlp_bias", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            layer_windows=_layer_windows(fields, architecture, num_layers),
            torch_dtype=fields.choice("dtype" if fields.has("dtype") else "torch_dtype", DTYPES),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            generation=GenerationDefaults.from_fields(more),
            quantization=QuantizationConfig.from_fields(fields),
        )


def _architecture(fields: Fields) -> str:
    given = fields.data.get("architectures")
    if not isinstance(given, list) or len(given) != 1 or given[0] not in ARCHITECTURES:
        raise fields.error("architectures", f"a list of one of {', '.join(ARCHITECTURES)}")
    return str(given[0])


def _refuse_unsupported(fields: Fields, architecture: str) -> None:
    """Raise for everything in the file that would change the arithmetic and is not computed here."""
    fields.choice("hidden_act", ("silu", "swish"))  # two names of one function; absent means silu
    if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "1 (the whole head is rotated)")
    if architecture != "LlamaForCausalLM" and fields.boolean("mlp_bias", False):
        raise fields.error("mlp_bias", f"false for {architecture}")
    if architecture == "MistralForCausalLM" and fields.boolean("attention_bias", False):
        raise fields.error("attention_bias", f"false for {architecture}")
    if architecture == "Qwen2ForCausalLM" and not fields.boolean("attention_bias", True):
        raise fields.error("attention_bias", f"true for {architecture}")


def _heads(fields: Fields, architecture: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension)"""
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    # Llama 1 has no such field; the later families always write it.
    kv_default = heads if architecture == "LlamaForCausalLM" else None
    kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, kv_default)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = fields.optional_integer("head_dim", 2, MAX_HEAD_DIM)
    if head_dim is None and architecture == "Qwen3ForCausalLM":
        head_dim = 128  # the one family whose default is not hidden_size / heads
    if head_dim is None:
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        if hidden % heads:
            raise fields.error("hidden_size", f"a multiple of num_attention_heads ({heads}) without head_dim")
        head_dim = hidden // heads
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ModelLoadError(
            f"{fields.where}: the head dimension must be even, from 2 to {MAX_HEAD_DIM}, got {head_dim}"
        )
    return heads, kv_heads, head_dim


def _layer_windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's attention window. The families disagree about what absent fields mean."""
    window = fields.optional_integer("sliding_window", 1, MAX_POSITIONS)
    first = 0
    if architecture == "LlamaForCausalLM" and window is not None:
        raise fields.error("sliding_window", f"null for {architecture}")
    if architecture == "MistralForCausalLM" and "sliding_window" not in fields.data:
        window = 4096  # what the first Mistral had; its successors write null
    if architecture.startswith("Qwen"):
        if not fields.boolean("use_sliding_window", False):
            window = None
        elif "sliding_window" not in fields.data:
            window = 4096
        first = fields.integer("max_window_layers", 0, MAX_LAYERS, 28)
    layer_types = fields.data.get("layer_types")
    if layer_types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"a list of {num_layers} entries, one per layer")
    if any(kind not in LAYER_TYPES for kind in layer_types):
        raise fields.error("layer_types", f"a list of {' and '.join(LAYER_TYPES)}")
    windows = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if window is None and "sliding_attention" in layer_types:
        raise fields.error("layer_types", "full_attention throughout, as no window is set")
    if architecture == "MistralForCausalLM" and len(set(windows) | {window}) > 1:
        raise fields.error("layer_types", f"the same for all layers of {architecture}")
    return windows


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    new, old = fields.object("rope_parameters"), fields.object("rope_scaling")
    if new and old and new != old:
        raise fields.error("rope_scaling", f"absent, or equal to rope_parameters ({new!r:.200})")
    rope = Fields(f"{fields.where}: {'rope_parameters' if new else 'rope_scaling'}", new or old or {})
    types = tuple(ROPE_KEYS)
    kind = rope.choice("rope_type", types) or rope.choice("type", types) or "default"
    unknown = [key for key in rope.data if key not in ROPE_KEYS[kind] + ROPE_NOTES and rope.has(key)]
    if unknown:
        allowed = ", ".join(("rope_type", "rope_theta", *ROPE_KEYS[kind]))
        raise rope.error(unknown[0], f"absent for rope type {kind}, which takes {allowed}")
    if rope.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "1 (the whole head is rotated)")
    theta = rope.optional_number("rope_theta", 1.0, 1e15)
    outer_theta = fields.optional_number("rope_theta", 1.0, 1e15)
    if theta is not None and outer_theta is not None and theta != outer_theta:
        raise fields.error("rope_theta", f"absent, or equal to rope_parameters' rope_theta ({theta:g})")
    theta = theta or outer_theta or 10_000.0
    if kind == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=max_positions)
    original_key = "original_max_position_embeddings"
    original = fields.optional_integer(original_key, 1, MAX_POSITIONS)  # the outer one, if there, wins
    original = original or rope.integer(original_key, 1, MAX_POSITIONS, max_positions)
    if kind == "yarn" and "factor" in rope.data and not rope.has("factor"):
        factor = max_positions / original  # an explicit null asks for this
    else:
        factor = rope.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeConfig(kind, theta, factor, original_max_position_embeddings=original)
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise rope.error("high_freq_factor", f"greater than low_freq_factor ({low:g})")
        return RopeConfig(kind, theta, factor, low, high, original)
    if theta == 1.0:
        raise rope.error("rope_theta", "greater than 1 for yarn, which divides by its logarithm")
    return RopeConfig(
        kind,
        theta,
        factor,
        original_max_position_embeddings=original,
        attention_factor=rope.optional_number("attention_factor", 1e-6, 1e6),
        beta_fast=rope.optional_number("beta_fast", 0.0, 1e6) or 32.0,
        beta_slow=rope.optional_number("beta_slow", 0.0, 1e6) or 1.0,
        mscale=rope.optional_number("mscale", 0.0, 1e6),
        mscale_all_dim=rope.optional_number("mscale_all_dim", 0.0, 1e6),
        truncate=rope.boolean("truncate", True),
    )
