# SPDX-License-Identifier: Apache-2.0
"""The perplexity of a text by another engine, for compare.py, in the environment of that engine.

    python bench/peer_perplexity.py ENGINE MODEL --threads 2 < windows.json

Reads [[token ids of a window, the first of them that counts], ...] and prints what `fastserve eval perplexity` does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable

Score = Callable[[list[int]], list[float]]  # of a window: the logprob of each token but the first


def transformers(model: str, threads: int) -> Score:
    import torch
    import transformers as library

    torch.set_num_threads(threads)
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def score(window: list[int]) -> list[float]:
        ids = torch.tensor([window])
        with torch.inference_mode():
            logprobs = network(ids).logits[0, :-1].float().log_softmax(-1)
        return [float(one) for one in logprobs.gather(-1, ids[0, 1:, None])[:, 0]]

    return score


def openvino(model: str, threads: int) -> Score:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
    config = genai.GenerationConfig()
    config.max_new_tokens = 1
    config.echo = config.ignore_eos = True
    config.logprobs = 1

    def score(window: list[int]) -> list[float]:
        handle = pipeline.add_request(0, ov.Tensor(np.array([window], np.int64)), config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return list(handle.read_all()[0].generated_log_probs[1 : len(window)])

    return score


def vllm(model: str, threads: int) -> Score:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import vllm as library

    network = library.LLM(model, dtype="bfloat16", max_model_len=4096, enable_prefix_caching=False)
    params = library.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def score(window: list[int]) -> list[float]:
        output = network.generate([{"prompt_token_ids": window}], params, use_tqdm=False)[0]
        return [output.prompt_logprobs[i][window[i]].logprob for i in range(1, len(window))]

    return score


ENGINES = {"transformers": transformers, "openvino": openvino, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    windows = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to stderr
    score = ENGINES[arguments.engine](arguments.model, arguments.threads)
    nats, num_tokens = 0.0, 0
    for window, first_scored in windows:
        logprobs = score(window)[first_scored - 1 :]
        nats -= sum(logprobs)
        num_tokens += len(logprobs)
    print(f"tokens {num_tokens}  perplexity {math.exp(nats / num_tokens):.4f}", file=answers, flush=True)


if __name__ == "__main__":
    main()
