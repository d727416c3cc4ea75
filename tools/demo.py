# SPDX-License-Identifier: Apache-2.0
"""The demo: one document, many questions about it, answered in one batch by a real model on this machine.

    python tools/demo.py MODEL_FOLDER [--num-threads N] [--dtype auto]

Every prompt starts with the same document of about 1,000 tokens. The engine computes it once and all requests
share its KV blocks; the summary shows what that saved.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from pathlib import Path

from fastserve import LLM, SamplingParams

DOCUMENT = (Path(__file__).parent / "demo_document.txt").read_text()

QUESTIONS = (
    "What is the lighthouse called?",
    "In which year was the lighthouse first lit?",
    "Who designed the tower?",
    "How tall is the tower?",
    "What was burned in the first lamp?",
    "Who was the first keeper?",
    "How many steps lead to the lantern room?",
    "What happened in the storm of 1889?",
    "How many sailors were saved from the Marigold?",
    "What did Agnes Rowe write in her diary?",
    "When did electricity come to the lighthouse?",
    "What is kept in the museum today?",
    "Which birds nest on the rock?",
    "How do visitors reach the island?",
    "When is the ferry not running?",
    "What does a ticket cost for an adult?",
    "How long does the guided tour take?",
    "What is the name of the keeper's dog?",
    "Why was the fog bell replaced?",
    "What did the fishermen give the keeper every winter?",
    "Who pays for the upkeep of the tower?",
    "What can be seen from the gallery on a clear day?",
    "When was the light automated?",
    "What should visitors bring?",
    "Is it allowed to bring dogs to the island?",
    "What colour are the stripes of the tower?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Many questions about one document, in one batch.")
    parser.add_argument("model", help="the model folder")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    begin = time.monotonic()
    options = {"num_threads": arguments.num_threads} if arguments.num_threads else {}
    with LLM(arguments.model, show_progress=True, dtype=arguments.dtype, **options) as llm:
        loaded = time.monotonic()
        conversations = [
            [{"role": "user", "content": f"{DOCUMENT}\n\nAnswer in one sentence. {question}"}] for question in QUESTIONS
        ]
        params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
        outputs = llm.chat(conversations, params)
        seconds = time.monotonic() - loaded

        for question, output in zip(QUESTIONS, outputs, strict=True):
            print(f"\nQ: {question}")
            print(textwrap.fill(output.outputs[0].text.strip(), 100, initial_indent="A: ", subsequent_indent="   "))

        stats = llm.loaded.engine.stats
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        cached_tokens = sum(output.num_cached_tokens or 0 for output in outputs)
        output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        ttft = sorted(output.metrics.first_token_s - output.metrics.arrival_s for output in outputs if output.metrics)
        print(f"\n{len(outputs)} questions about one document of {_shared_prefix(outputs):,} tokens")
        rows = (
            ("model loaded in", f"{loaded - begin:.1f} s"),
            ("answered in", f"{seconds:.1f} s"),
            ("tokens generated", f"{output_tokens:,} ({output_tokens / seconds:.0f} tok/s)"),
            ("prompt tokens requested", f"{prompt_tokens:,} ({prompt_tokens / seconds:.0f} tok/s)"),
            (
                "prompt tokens computed",
                f"{prompt_tokens - cached_tokens:,}; {cached_tokens:,} came from shared blocks",
            ),
            ("time to first token", f"median {statistics.median(ttft):.2f} s, longest {ttft[-1]:.2f} s"),
            ("KV blocks used", f"{stats.peak_used_blocks:,} of {stats.num_blocks:,} at the peak"),
            ("steps", f"{stats.num_steps:,}"),
        )
        for name, value in rows:
            print(f"  {name:<24}{value}")


def _shared_prefix(outputs: list) -> int:
    """The number of tokens with which all prompts begin."""
    columns = zip(*(output.prompt_token_ids for output in outputs), strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)


if __name__ == "__main__":
    main()
