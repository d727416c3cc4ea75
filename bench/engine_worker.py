# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, for compare.py: reads runs as JSON lines, answers each with its seconds.

    python bench/engine_worker.py ENGINE MODEL --threads 2

Runs in the environment of the engine, so it imports nothing but the engine. A run is
{"prompts": [[token id, ...], ...], "num_output": n}; all prompts of a run have the same length, and each gets exactly n
greedy tokens, as ids. The first line that is answered says what the engine is, and how many seconds it took to load.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]  # the number of new tokens of each prompt
KV_GIB = 2  # of KV cache, where an engine lets it be set


def fastserve(model: str, threads: int, activation_dtype: str = "auto") -> tuple[str, Generate]:
    from fastserve import LLM, SamplingParams, __version__, _native

    llm = LLM(
        model,
        num_threads=threads,
        kv_cache_memory_bytes=KV_GIB << 30,
        max_num_seqs=64,
        activation_dtype=activation_dtype,
    )

    def generate(prompts: list[list[int]], num_output: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return f"fastserve {__version__} ({_native.isa()})", generate


def fastserve_w4a12(model: str, threads: int) -> tuple[str, Generate]:
    return fastserve(model, threads, "int12")


def transformers(model: str, threads: int) -> tuple[str, Generate]:
    import torch
    import transformers as library

    torch.set_num_threads(threads)
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    network.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], num_output: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=num_output, max_new_tokens=num_output,
            )  # fmt: skip
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return f"transformers {library.__version__} (sdpa, bf16)", generate


def openvino(model: str, threads: int) -> tuple[str, Generate]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_GIB
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = True
    pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def generate(prompts: list[list[int]], num_output: int) -> list[int]:
        config = genai.GenerationConfig()
        config.max_new_tokens = num_output
        config.min_new_tokens = num_output
        config.ignore_eos = True
        config.do_sample = False
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return [len(tokens) for tokens in pipeline.generate(inputs, config).tokens]

    return f"openvino-genai {genai.__version__}", generate


def vllm(model: str, threads: int) -> tuple[str, Generate]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process, whose memory and CPU time are measured
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"  # left to itself it keeps a core for others
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_GIB)
    import vllm as library

    network = library.LLM(model, dtype="bfloat16", max_model_len=4096, max_num_seqs=64, enable_prefix_caching=True)

    def generate(prompts: list[list[int]], num_output: int) -> list[int]:
        params = library.SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        outputs = network.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return f"vllm {library.__version__} (bf16, compiled)", generate


ENGINES = {
    "fastserve": fastserve,
    "fastserve_w4a12": fastserve_w4a12,
    "transformers": transformers,
    "openvino": openvino,
    "vllm": vllm,
}


def peak_bytes() -> int:
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to stderr

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    begin = time.perf_counter()
    name, generate = ENGINES[arguments.engine](arguments.model, arguments.threads)
    answer({"name": name, "load_s": time.perf_counter() - begin})
    for line in sys.stdin:
        work = json.loads(line)
        begin = time.perf_counter()
        try:
            counts = generate(work["prompts"], work["num_output"])
        except Exception as error:  # told to compare.py, which says it beside the figures
            answer({"error": f"{type(error).__name__}: {error}"})
            continue
        answer({"seconds": time.perf_counter() - begin, "counts": counts, "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
