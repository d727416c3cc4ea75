# SPDX-License-Identifier: Apache-2.0
"""The `fastserve` command. Nothing heavy is imported before a subcommand needs it: `--version` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import fastserve
from fastserve.bench import offline
from fastserve.bench import serve as bench_serve
from fastserve.server.options import TOOL_FORMATS, add_serve_arguments
from fastserve.simulate.command import DESCRIPTION as SIMULATE_DESCRIPTION
from fastserve.simulate.command import add_simulate_arguments

if TYPE_CHECKING:
    from fastserve.config import SamplingParams
    from fastserve.llm import LLM


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 an error that is printed, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    from fastserve.errors import FastserveError

    try:
        return int(arguments.run(arguments) or 0)
    except (FastserveError, OSError) as error:
        print(f"fastserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastserve", description="An LLM inference engine for many requests.")
    parser.add_argument("--version", action="version", version=f"fastserve {fastserve.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts with a model and print the results.",
    )
    _add_model_arguments(generate)
    _add_sampling_arguments(generate, max_tokens=128)
    generate.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; may be repeated")
    generate.add_argument("-f", "--file", help="a file of prompts, one a line; - for standard input")
    generate.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat", help="talk to a model", description="Talk to a model. An empty line or Ctrl-D ends it."
    )
    _add_model_arguments(chat)
    _add_sampling_arguments(chat, max_tokens=None)
    chat.add_argument("--system", help="a system message")
    chat.set_defaults(run=_chat)

    _add_batch_parser(commands)
    _add_eval_parser(commands)
    _add_bench_parser(commands)

    serve = commands.add_parser(
        "serve",
        help="answer OpenAI API requests over HTTP",
        description="Serve a model over HTTP with OpenAI's API. Every flag has an environment variable as its twin.",
    )
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve)

    simulate = commands.add_parser(
        "simulate", help="serve a workload in virtual time on a named GPU", description=SIMULATE_DESCRIPTION
    )
    add_simulate_arguments(simulate)
    simulate.set_defaults(run=_simulate)

    convert = commands.add_parser(
        "convert",
        help="make a model folder of a GGUF file",
        description="Convert a GGUF file to a Hugging Face model folder (config, safetensors, tokenizer). "
        "Weights in Q4_0 and Q4_1 stay int4, code for code.",
    )
    convert.add_argument("gguf", metavar="model.gguf", help="the GGUF file (llama architecture)")
    convert.add_argument("dir", metavar="DIR", help="the model folder to write")
    dtypes = ("bfloat16", "float16", "float32")
    convert.add_argument(
        "--dtype", choices=dtypes, default="bfloat16", help="of weights that are not int4 (default: bfloat16)"
    )
    convert.add_argument("--dequantize", action="store_true", help="write 4-bit weights in --dtype too")
    convert.add_argument("--force", action="store_true", help="replace DIR if it is a model folder already")
    convert.set_defaults(run=_convert)

    _add_quantize_parser(commands)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine and this build can do",
        description="Print what this machine and this build can do, and what to do where something is missing.",
    )
    doctor.add_argument("--ops", action="store_true", help="also the table of ops, devices and dtypes")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_batch_parser(commands: Any) -> None:
    batch = commands.add_parser(
        "run-batch",
        help="answer a file of OpenAI API requests",
        description="Answer a batch file: JSON lines with custom_id, method, url and body, for /v1/chat/completions "
        "and /v1/completions. Results are written as they complete, in any order, and survive a kill.",
    )
    _add_model_arguments(batch, optional=True)
    batch.add_argument("--model", dest="model_option", metavar="MODEL", help="the model folder, as vLLM has it")
    batch.add_argument("-i", "--input-file", required=True, help="the batch, JSON lines")
    batch.add_argument("-o", "--output-file", required=True, help="the results, JSON lines")
    how = batch.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with results that an earlier run began")
    how.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    batch.add_argument(
        "--served-model-name", action="append", help="what a body's model may be, may be repeated (default: the folder)"
    )
    batch.add_argument("--tool-call-parser", choices=TOOL_FORMATS, help="(default: what the chat template shows)")
    batch.add_argument(
        "--batch-order", choices=("prefix", "arrival"), default="prefix",
        help="prefix: lines that begin alike run together; arrival: as they stand (default: prefix)",
    )  # fmt: skip
    batch.set_defaults(run=_run_batch)


def _add_eval_parser(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="measure a model", description="Measure a model.")
    measures = evaluate.add_subparsers(title="measures", required=True, metavar="MEASURE")
    perplexity = measures.add_parser(
        "perplexity",
        help="how well it predicts a text",
        description="Print the perplexity of a model on a text, in windows of --context tokens.",
    )
    _add_model_arguments(perplexity)
    perplexity.add_argument("--text", required=True, help="a UTF-8 text file")
    perplexity.add_argument("--max-tokens", type=int, help="tokens of the text to use (default: all)")
    perplexity.add_argument("--context", type=int, help="tokens of a window (default: 1024, or the model's limit)")
    perplexity.add_argument("--stride", type=int, help="tokens from window to window (default: the context)")
    perplexity.set_defaults(run=_perplexity)


def _add_bench_parser(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="measure speed", description="Measure the speed of an engine or a server."
    )
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    serve = kinds.add_parser(
        "serve",
        help="load on a running server",
        description="Send requests to a server with OpenAI's API at a rate, and report its throughput and latencies.",
    )
    bench_serve.add_arguments(serve)
    serve.set_defaults(run=bench_serve.run)
    throughput = kinds.add_parser(
        "throughput", help="tokens per second of a batch", description="Complete a batch of prompts of real text."
    )
    offline.add_throughput_arguments(throughput)
    throughput.set_defaults(run=offline.run_throughput)
    latency = kinds.add_parser(
        "latency", help="seconds of one batch", description="Time the same batch again and again, without caching."
    )
    offline.add_latency_arguments(latency)
    latency.set_defaults(run=offline.run_latency)
    startup = kinds.add_parser(
        "startup", help="seconds until the first token", description="Time new processes up to their first token."
    )
    offline.add_startup_arguments(startup)
    startup.set_defaults(run=offline.run_startup)


def _add_quantize_parser(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="make an int4 copy of a model",
        description="Write an int4 copy of a model folder. A run that was interrupted is taken up where it was by the "
        "same command. With --text the perplexity before and after is printed, on tokens that calibrated nothing.",
    )
    quantize.add_argument("model", help="a model folder (Hugging Face layout, safetensors), not quantised")
    quantize.add_argument("dir", help="the folder to write")
    quantize.add_argument("--method", default="rtn", help="rtn (round to nearest) or gptq (default: rtn)")
    quantize.add_argument("--form", default="minimums", help="symmetric, zero-points or minimums (default: minimums)")
    quantize.add_argument(
        "--group-size", type=int, default=32, help="inputs that share a scale: 32, 64, 128, -1 = a row (default: 32)"
    )
    quantize.add_argument(
        "--embedding-dtype",
        default="auto",
        help="of the embedding and the head: auto (as they are) or int8 (default: auto)",
    )
    quantize.add_argument("--text", help="a UTF-8 text file: calibrates gptq, and measures the perplexity")
    quantize.add_argument("--calibration-tokens", type=int, default=65536, help="of --text (default: %(default)s)")
    quantize.add_argument("--eval-tokens", type=int, default=16384, help="of --text, after those; 0: none")
    quantize.add_argument("--num-threads", type=int, help="threads (default: the physical cores)")
    quantize.add_argument("--force", action="store_true", help="replace DIR if it is a model folder already")
    quantize.set_defaults(run=_quantize)


def _add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "model", nargs="?" if optional else None, help="a model folder (Hugging Face layout, safetensors)"
    )
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    group.add_argument("--kv-cache-dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    group.add_argument("--quantization", help="auto, or none: int4 weights are written out in --dtype (default: auto)")
    group.add_argument(
        "--activation-dtype", help="what int4 and int8 weights are multiplied with: auto, int8, int12 or float"
    )
    group.add_argument("--lm-head-dtype", help="auto: as in the checkpoint, or int8 (default: auto)")
    group.add_argument("--max-model-len", type=int, help="longest context in tokens (default: what fits)")
    group.add_argument("--max-num-batched-tokens", type=int, help="tokens of one step")
    group.add_argument("--max-num-seqs", type=int, help="requests of one step")
    group.add_argument("--policy", help="who starts first: fcfs or priority (default: fcfs)")
    group.add_argument(
        "--admission", help="who may start: past_future, aggressive or conservative (default: past_future)"
    )
    group.add_argument("--kv-cache-memory-bytes", type=int, help="memory for the KV cache (default: planned)")
    group.add_argument("--num-threads", type=int, help="threads (default: the physical cores)")
    group.add_argument("--seed", type=int, default=0, help="seeds requests without a seed (default: 0)")


def _add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    limit = "until the context is full" if max_tokens is None else str(max_tokens)
    group.add_argument("--max-tokens", type=int, default=max_tokens, help=f"tokens to generate (default: {limit})")
    group.add_argument("--temperature", type=float, help="0 = greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--stop", action="append", help="a stop string; may be repeated")


def _open(arguments: argparse.Namespace, **more: Any) -> LLM:
    from fastserve.llm import LLM

    names = ["dtype", "kv_cache_dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs"]
    names += ["quantization", "activation_dtype", "lm_head_dtype", "kv_cache_memory_bytes", "num_threads", "seed"]
    names += ["policy", "admission"]
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return LLM(arguments.model, show_progress=sys.stderr.isatty(), **options, **more)


def _sampling(arguments: argparse.Namespace, llm: LLM) -> SamplingParams:
    from dataclasses import replace

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(llm.get_default_sampling_params(), max_tokens=arguments.max_tokens, **given)


def _generate(arguments: argparse.Namespace) -> int:
    import json

    prompts: list[str] = list(arguments.prompt)
    if arguments.file:
        with sys.stdin if arguments.file == "-" else open(arguments.file, encoding="utf-8") as lines:
            prompts += [line.rstrip("\n") for line in lines if line.strip()]
    if not prompts:
        print("fastserve generate: no prompt given; use --prompt or --file", file=sys.stderr)
        return 2
    with _open(arguments) as llm:
        params = _sampling(arguments, llm)
        show = sys.stderr.isatty()
        if arguments.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            results = llm.chat(conversations, params, use_tqdm=show)
        else:
            results = llm.generate(prompts, params, use_tqdm=show)
    for prompt, result in zip(prompts, results, strict=True):
        answer = result.outputs[0]
        if arguments.json:
            fields: dict[str, Any] = {"prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason}
            fields |= {
                "prompt_tokens": len(result.prompt_token_ids),
                "completion_tokens": len(answer.token_ids),
            }
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(prompt if arguments.chat else prompt + answer.text)
            print((answer.text + "\n") if arguments.chat else "")
    return int(any(result.outputs[0].finish_reason == "error" for result in results))


def _chat(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from fastserve.config import RequestOutputKind

    with _open(arguments) as llm:
        params = replace(_sampling(arguments, llm), output_kind=RequestOutputKind.DELTA)
        messages: list[dict[str, str]] = []
        if arguments.system:
            messages.append({"role": "system", "content": arguments.system})
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                break
            if not text.strip():
                break
            messages.append({"role": "user", "content": text})
            answer = ""
            for piece in llm.stream_chat(messages, params):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def _perplexity(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastserve.evaluate import DEFAULT_CONTEXT, measure_perplexity, read_text_tokens
    from fastserve.model_config import ModelConfig

    if arguments.max_model_len is None:  # no more KV cache than a window needs
        limit = ModelConfig.from_dir(arguments.model).max_position_embeddings
        arguments.max_model_len = max(2, min((arguments.context or DEFAULT_CONTEXT) + 1, limit))
    with _open(arguments) as llm, tqdm(unit="token", desc="perplexity", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        tokens = read_text_tokens(llm, arguments.text, arguments.max_tokens)
        result = measure_perplexity(llm, tokens, context=arguments.context, stride=arguments.stride, progress=progress)
    print(result)
    return 0


def _run_batch(arguments: argparse.Namespace) -> int:
    if (arguments.model is None) == (arguments.model_option is None):
        print("fastserve run-batch: give a model folder, once", file=sys.stderr)
        return 2
    arguments.model = arguments.model or arguments.model_option
    try:
        from fastserve.run_batch import run_batch_command
    except ModuleNotFoundError as error:
        return _needs_server_extra("run-batch", error)
    return run_batch_command(arguments, lambda: _open(arguments, batch_order=arguments.batch_order))


def _needs_server_extra(command: str, error: ModuleNotFoundError) -> int:
    if (error.name or "").startswith("fastserve"):
        raise error
    print(f"fastserve {command} needs {error.name}: pip install 'fastserve[server]'", file=sys.stderr)
    return 1


def _serve(arguments: argparse.Namespace) -> int:
    from fastserve.server.options import read_options

    try:
        options = read_options(arguments)
        from fastserve.server.serve import serve
    except ValueError as error:
        print(f"fastserve serve: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        return _needs_server_extra("serve", error)
    if arguments.model is None:
        print("fastserve serve: give a model folder", file=sys.stderr)
        return 2
    return serve(arguments.model, options)


def _simulate(arguments: argparse.Namespace) -> int:
    from fastserve.simulate.command import run

    return run(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastserve.weights.gguf import convert_gguf

    with tqdm(unit="tensor", desc="convert", disable=None) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        out = convert_gguf(
            arguments.gguf,
            arguments.dir,
            dtype=arguments.dtype,
            dequantize=arguments.dequantize,
            force=arguments.force,
            progress=progress,
        )
    print(out)
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastserve.errors import InvalidRequest
    from fastserve.tokenizer import Tokenizer
    from fastserve.weights.quantize import QuantizeSettings, quantize_model

    settings = QuantizeSettings(arguments.method, arguments.form, arguments.group_size, arguments.embedding_dtype)
    for name, least in (("calibration_tokens", 2), ("eval_tokens", 0)):
        if getattr(arguments, name) < least:
            raise InvalidRequest(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    calibration: list[int] = []
    scored: list[int] = []
    if arguments.text:
        from fastserve.evaluate import read_text

        tokens = Tokenizer.from_dir(arguments.model).encode(read_text(arguments.text))
        split = min(arguments.calibration_tokens, len(tokens) // 2)
        calibration, scored = tokens[:split], tokens[split : split + arguments.eval_tokens]
    before = _perplexity_of(arguments, arguments.model, scored, "before") if len(scored) > 1 else None
    with tqdm(unit="layer", desc="quantize", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        out = quantize_model(
            arguments.model,
            arguments.dir,
            settings,
            calibration,
            num_threads=arguments.num_threads,
            force=arguments.force,
            progress=progress,
        )
    print(out)
    if before is not None:
        after = _perplexity_of(arguments, str(out), scored, "after")
        print(f"perplexity {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%}), {len(scored)} tokens")
    return 0


def _perplexity_of(arguments: argparse.Namespace, folder: str, tokens: list[int], when: str) -> float:
    from tqdm import tqdm

    from fastserve.evaluate import DEFAULT_CONTEXT, measure_perplexity
    from fastserve.llm import LLM
    from fastserve.model_config import ModelConfig

    longest = min(DEFAULT_CONTEXT + 1, ModelConfig.from_dir(folder).max_position_embeddings)
    options = {"max_model_len": longest, "num_threads": arguments.num_threads, "skip_tokenizer_init": True}
    with LLM(folder, **options) as llm, tqdm(unit="token", desc=f"perplexity {when}", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return measure_perplexity(llm, tokens, progress=progress).perplexity


def _doctor(arguments: argparse.Namespace) -> int:
    from fastserve.doctor import report

    text, healthy = report(ops=arguments.ops)
    print(text)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
