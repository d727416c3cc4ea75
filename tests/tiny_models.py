# SPDX-License-Identifier: Apache-2.0
"""Tiny random model folders, written by transformers itself, for parity tests: each supported architecture
and RoPE variant, sharded or not, with a tiny tokenizer. Everything is a function of the arguments and the
seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog answers: why not?",
    "A river of words, 12 numbers, 3.14 and 2024; naïve café, déjà vu, Straße.",
    "你好,世界 🙂 привет мир こんにちは",
    "def add(a, b):\n    return a + b\n\tprint('done')  # two  spaces",
]
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ARCHITECTURES: dict[str, tuple[type, type]] = {
    "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "MistralForCausalLM": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def byte_level_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """GPT-2 style: every text encodes, tokens may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece_tokenizer(*, byte_fallback: bool = True) -> Tokenizer:
    """Llama 2 style: words begin with U+2581, unknown characters become byte tokens, <s> goes in front."""
    words = sorted({"▁" + word for text in TEXT for word in text.split()})
    letters = sorted({char for char in "".join(words) if ord(char) < 0x250} | {"▁"})
    pieces = [*SPECIAL, *letters]
    if byte_fallback:
        pieces[len(SPECIAL) : len(SPECIAL)] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = []
    for word in words:  # every word grows letter by letter to one token
        for end in range(1, len(word)):
            left, right = word[:end], word[end]
            if left in vocab and right in vocab:
                vocab.setdefault(left + right, len(vocab))
                merges.append((left, right))
    model = models.BPE(
        vocab, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
    )
    tokenizer = Tokenizer(model)
    if byte_fallback:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*fused, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write both tokenizer files; `config` overrides entries of tokenizer_config.json, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    merged = {**defaults, "tokenizer_class": "PreTrainedTokenizerFast", **config}
    given = {key: value for key, value in merged.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def make_tiny_checkpoint(
    folder: str | Path,
    architecture: str = "LlamaForCausalLM",
    *,
    rope: str | dict[str, Any] = "default",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    tokenizer: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny random Hugging Face folder and return its path.

    Two layers of width 64, four query heads on two key/value heads, 512 tokens. `overrides` are config fields
    (tie_word_embeddings, sliding_window, head_dim, num_key_value_heads, attention_bias, ...); `rope` is a key
    of ROPES or rope parameters; max_shard_size such as "100KB" makes a sharded checkpoint.

    A random model's logits are nearly flat, and comparing their argmax would test rounding. Here norm weights
    and biases are random too (so that a forgotten one is noticed), and the output rows are long, so that the
    best token leads by a margin far above rounding errors.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": dict(ROPES[rope] if isinstance(rope, str) else rope),
    }
    if architecture == "MistralForCausalLM":
        sizes["sliding_window"] = None
    config = config_class(**{**sizes, **overrides}, architectures=[architecture])
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    folder = Path(folder)
    more = {"max_shard_size": max_shard_size} if max_shard_size else {}
    model.to(dtype).save_pretrained(folder, **more)
    if tokenizer:
        write_tokenizer(folder, byte_level_tokenizer(min(512, config.vocab_size)))
    return folder
