# SPDX-License-Identifier: Apache-2.0
"""The flags of `fastserve serve`, each with a twin among the environment variables. A flag beats its variable.

Imports nothing heavy: `fastserve --version` reads this file too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "FASTSERVE_"
TOOL_FORMATS = ("hermes", "llama3_json", "mistral")


def _tokens(text: str) -> int:
    """A number of tokens; 4k is 4096, 4K too."""
    return int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)


def _model_len(text: str) -> int | None:
    return None if text == "auto" else _tokens(text)


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 1 or 0")


def _port(text: str) -> int:
    if not 0 <= int(text) <= 65535:
        raise ValueError("must be 0 to 65535 (0 = any that is free)")
    return int(text)


def _tool_format(text: str) -> str:
    if text not in TOOL_FORMATS:
        raise ValueError(f"must be one of {', '.join(TOOL_FORMATS)}")
    return text


def _seconds(text: str) -> float:
    if not 0 <= float(text) <= 1e6:
        raise ValueError("must be 0 to 1000000 seconds")
    return float(text)


def _option(default: Any, read: Callable[[str], Any], text: str, *, engine: bool = False) -> Any:
    """`engine`: it is an option of EngineConfig, whose default holds when it is None."""
    metadata = {"read": read, "help": text, "engine": engine}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ServeOptions:
    """Everything about the server; names and defaults of the flags."""

    host: str = _option("127.0.0.1", str, "address to listen on; 0.0.0.0 = every one of this machine")
    port: int = _option(8000, _port, "port to listen on; 0 = any that is free")
    uds: str | None = _option(None, str, "listen on this unix socket instead")
    served_model_name: list[str] = _option([], str, "name of the model in the API, may be repeated")  # noqa: RUF009
    api_key: list[str] = _option([], str, "key that clients must send, may be repeated (default: none is needed)")  # noqa: RUF009
    allowed_origins: list[str] = _option([], str, "web origin that may use the API, may be repeated")  # noqa: RUF009
    shutdown_timeout: float = _option(30.0, _seconds, "seconds that running requests get after SIGTERM")
    max_body_bytes: int = _option(8 * 2**20, int, "largest request body")
    body_timeout: float = _option(30.0, _seconds, "seconds that a request body may take to arrive")
    batch_dir: str | None = _option(None, str, "folder for files and batches (default: these endpoints are off)")
    max_file_bytes: int = _option(200 * 2**20, int, "largest file that can be uploaded")
    keep_alive_comment: float = _option(15.0, _seconds, "seconds of silence in a stream after which a comment is sent")
    max_step_seconds: float = _option(120.0, _seconds, "health fails when one engine step takes longer")
    keep_alive_on_engine_death: bool = _option(False, _flag, "go on answering 503 when the engine has died")
    enable_vllm_metrics: bool = _option(False, _flag, "show every metric under the prefix vllm: as well")
    access_log: bool = _option(False, _flag, "log every HTTP request, not only finished generations")
    log_level: str = _option("info", str, "debug, info, warning or error")
    tool_call_parser: str | None = _option(
        None, _tool_format, "hermes, llama3_json or mistral (default: what the chat template shows)"
    )
    tokenizer: str | None = _option(None, str, "folder of the tokenizer (default: the model's)")

    dtype: str | None = _option(None, str, "auto, float32, bfloat16 or float16", engine=True)
    kv_cache_dtype: str | None = _option(None, str, "auto, float32 or bfloat16", engine=True)
    quantization: str | None = _option(None, str, "auto, or none: int4 weights written out in dtype", engine=True)
    activation_dtype: str | None = _option(
        None, str, "what int4 and int8 weights are multiplied with: auto, int8 or float", engine=True
    )
    lm_head_dtype: str | None = _option(None, str, "auto: as in the checkpoint, or int8", engine=True)
    max_model_len: int | None = _option(
        None, _model_len, "longest context in tokens; auto = what fits, 4k = 4096", engine=True
    )
    max_num_batched_tokens: int | None = _option(None, _tokens, "tokens of one step", engine=True)
    max_num_seqs: int | None = _option(None, int, "requests of one step", engine=True)
    max_num_queued_requests: int | None = _option(None, int, "waiting requests; more are refused with 429", engine=True)
    kv_cache_memory_bytes: int | None = _option(None, int, "memory for the KV cache (default: planned)", engine=True)
    num_blocks: int | None = _option(None, int, "blocks of the KV cache, to test preemption", engine=True)
    block_size: int | None = _option(None, int, "tokens of a block of the KV cache", engine=True)
    enable_prefix_caching: bool | None = _option(None, _flag, "share the KV of common prefixes", engine=True)
    max_logprobs: int | None = _option(None, int, "most logprobs that a request may ask for", engine=True)
    num_threads: int | None = _option(None, int, "threads (default: the physical cores)", engine=True)
    policy: str | None = _option(None, str, "fcfs or priority", engine=True)
    seed: int | None = _option(None, int, "seeds requests that bring no seed", engine=True)

    def engine_options(self) -> dict[str, Any]:
        """What was set of EngineConfig."""
        names = [one.name for one in fields(self) if one.metadata["engine"]]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


_SPELLINGS = {
    "policy": ("--scheduling-policy",),
    "max_num_queued_requests": ("--max-num-queued-reqs", "--max-num-queued-requests"),
    "num_blocks": ("--num-gpu-blocks-override", "--num-blocks"),
}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder (Hugging Face layout, safetensors)")
    groups = {False: parser.add_argument_group("server"), True: parser.add_argument_group("engine")}
    for one in fields(ServeOptions):
        group, text = groups[one.metadata["engine"]], one.metadata["help"]
        names = _SPELLINGS.get(one.name, ("--" + one.name.replace("_", "-"),))
        if one.default is not None and one.default is not False and isinstance(one.default, (str, int, float)):
            text += f" (default: {one.default})"
        text = f"{text} [{variable(one.name)}]".replace("%", "%%")
        if one.metadata["read"] is _flag:
            action = argparse.BooleanOptionalAction
            group.add_argument(*names, dest=one.name, action=action, default=None, help=text)
        elif isinstance(one.default_factory, type):
            group.add_argument(*names, dest=one.name, action="append", default=None, help=text)
        else:
            group.add_argument(*names, dest=one.name, type=_reader(one.metadata["read"]), default=None, help=text)


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return checked


def variable(name: str) -> str:
    """The environment variable of an option: FASTSERVE_ and the flag's name."""
    return PREFIX + name.upper()


def read_options(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServeOptions:
    """Flag, else environment variable, else default. ValueError names a variable that cannot be read."""
    values: dict[str, Any] = {}
    for one in fields(ServeOptions):
        given = getattr(arguments, one.name)
        if given is not None:
            values[one.name] = given
            continue
        text = environment.get(variable(one.name))
        if text is None:
            continue
        if one.name == "port" and "://" in text:
            continue  # Kubernetes sets FASTSERVE_PORT=tcp://... for a service named fastserve
        try:
            read = one.metadata["read"]
            is_list = isinstance(one.default_factory, type)
            values[one.name] = [part.strip() for part in text.split(",") if part.strip()] if is_list else read(text)
        except ValueError as error:
            raise ValueError(f"environment variable {variable(one.name)}={text[:80]!r}: {error}") from None
    return ServeOptions(**values)
