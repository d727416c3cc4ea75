# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens equal those of `transformers` in float32: on the real demo model, and on tiny checkpoints of every
architecture and RoPE variant.

The oracle reads prompt + output in one pass without a cache and says, for each output token, what greedy decoding
would have chosen there. By induction that is the same as comparing with `generate`, at the price of one prefill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve import LLM, RequestOutput, SamplingParams
from tiny_models import ARCHITECTURES, ROPES, make_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def assert_greedy(reference: torch.nn.Module, outputs: list[RequestOutput]) -> None:
    """Every output token is the reference's argmax; on a mismatch the margin tells a bug from a tie."""
    wrong = []
    for output in outputs:
        prompt, chosen = output.prompt_token_ids, list(output.outputs[0].token_ids)
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].float()
        top = logits.topk(2, dim=-1)
        for step, token in enumerate(chosen):
            if int(top.indices[step, 0]) != token:
                margin = float(top.values[step, 0] - top.values[step, 1])
                wrong.append(
                    f"request {output.request_id} ({len(prompt)} prompt tokens), output token {step}: got {token}, "
                    f"transformers has {top.indices[step].tolist()} with a margin of {margin:.3g} between its first two"
                )
                break
    assert not wrong, "\n".join(wrong)


def real_prompts(llm: LLM) -> list[list[int]]:
    """Real texts, cut to lengths from 1 to 1,500 tokens."""
    tokenizer = llm.get_tokenizer()
    guide = tokenizer.encode((ROOT / "tools" / "demo_document.txt").read_text())
    licence = tokenizer.encode((ROOT / "LICENSE").read_text())
    contributing = tokenizer.encode((ROOT / "CONTRIBUTING.md").read_text())
    lengths = (1, 2, 3, 7, 15, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 300, 511, 513, 700, 1024, 1500)
    texts = (licence, contributing, guide)
    prompts = [
        (texts[i % 3] if length < 600 else licence)[i * 11 : i * 11 + length] for i, length in enumerate(lengths)
    ]
    questions = ("Why is the sky blue?", "Write a haiku about the sea.", "Liste drei Tiere auf.", "1, 1, 2, 3, 5, 8,")
    return prompts + [tokenizer.encode(question) for question in questions]


def test_demo_model_in_one_batch_equals_transformers(demo_model_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    with LLM(demo_model_dir, dtype="float32", max_model_len=2048) as llm:
        prompts = real_prompts(llm)
        assert len(prompts) >= 20
        assert max(map(len, prompts)) >= 1500
        assert min(map(len, prompts)) == 1
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 64 for output in outputs)
    assert_greedy(reference, outputs)


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name} {rope}": {"architecture": name, "rope": rope} for name in ARCHITECTURES for rope in ROPES},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"max_shard_size": "100KB"},
    "one head each": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "eight heads on one": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "odd widths": {"hidden_size": 72, "intermediate_size": 100, "head_dim": 22},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "mistral window": {"architecture": "MistralForCausalLM", "sliding_window": 24},
    "qwen2 window in upper layers": {
        "architecture": "Qwen2ForCausalLM", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
    },
    "qwen3 window": {
        "architecture": "Qwen3ForCausalLM", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_checkpoint_equals_transformers(variant: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, **VARIANTS[variant])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, max_num_batched_tokens=48, block_size=16) as llm:
        vocab_size = llm.loaded.model_config.vocab_size
        lengths = (1, 2, 5, 15, 16, 17, 40, 90)
        prompts = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_greedy(reference, outputs)
