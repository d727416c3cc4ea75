# SPDX-License-Identifier: Apache-2.0
"""The flags of `fastserve serve`. Each can be an environment variable or a line of a configuration file too: a flag
beats its variable, a variable the file, the file the default.

Imports nothing heavy: `fastserve --version` reads this file too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
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


_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names


def _dtype(text: str) -> str:
    return _DTYPES.get(text, text)


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return read


def _object(text: str) -> dict[str, Any]:
    import json

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _bucket(text: str) -> float:
    if not 0 < float(text) < 1e9:
        raise ValueError("must be a number of seconds above 0")
    return float(text)


def _at_least_1(text: str) -> int:
    if int(text) < 1:
        raise ValueError("must be at least 1")
    return int(text)


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

    config: str | None = _option(None, str, "YAML file of these options, by the names of the flags")
    host: str = _option("127.0.0.1", str, "address to listen on; 0.0.0.0 = every one of this machine")
    port: int = _option(8000, _port, "port to listen on; 0 = any that is free")
    uds: str | None = _option(None, str, "listen on this unix socket instead")
    served_model_name: list[str] = _option([], str, "name of the model in the API, may be repeated")  # noqa: RUF009
    api_key: list[str] = _option([], str, "key that clients must send, may be repeated (default: none is needed)")  # noqa: RUF009
    root_path: str = _option("", str, "path under which a proxy in front shows this server")
    ssl_keyfile: str | None = _option(None, str, "key for HTTPS, PEM; needs --ssl-certfile")
    ssl_certfile: str | None = _option(None, str, "certificate for HTTPS, PEM, with those that it rests on")
    ssl_keyfile_password: str | None = _option(None, str, "of the key; better in the variable than in the flag")
    ssl_ca_certs: str | None = _option(None, str, "clients must have a certificate that one of these vouches for, PEM")
    allowed_origins: list[str] = _option([], str, "web origin that may use the API, may be repeated")  # noqa: RUF009
    allowed_methods: list[str] = _option([], str, "HTTP method of these origins, may be repeated (default: all)")  # noqa: RUF009
    allowed_headers: list[str] = _option([], str, "header of these origins, may be repeated (default: all)")  # noqa: RUF009
    shutdown_timeout: float = _option(30.0, _seconds, "seconds that running requests get after SIGTERM")
    max_body_bytes: int = _option(8 * 2**20, int, "largest request body")
    h11_max_incomplete_event_size: int = _option(64 * 1024, _at_least_1, "bytes of a request's headers")
    max_num_queued_tokens: int | None = _option(
        None, _at_least_1, "tokens of waiting prompts; more are refused with 429 (default: only requests are bounded)"
    )
    body_timeout: float = _option(30.0, _seconds, "seconds that a request body may take to arrive")
    batch_dir: str | None = _option(None, str, "folder for files and batches (default: these endpoints are off)")
    max_file_bytes: int = _option(200 * 2**20, int, "largest file that can be uploaded")
    keep_alive_comment: float = _option(15.0, _seconds, "seconds of silence in a stream after which a comment is sent")
    max_step_seconds: float = _option(120.0, _seconds, "health fails when one engine step takes longer")
    keep_alive_on_engine_death: bool = _option(False, _flag, "go on answering 503 when the engine has died")
    enable_vllm_metrics: bool = _option(False, _flag, "show every metric under the prefix vllm: as well")
    custom_histogram_buckets: list[float] = _option([], _bucket, "bound of the histograms of seconds, may be repeated")  # noqa: RUF009
    disable_log_stats: bool = _option(False, _flag, "do not log a line of rates while there is work")
    log_stats_interval: float = _option(10.0, _bucket, "seconds between these lines")
    enable_log_requests: bool = _option(False, _flag, "log every request's parameters and prompt when it comes")
    max_log_len: int = _option(200, int, "characters of a prompt in this log")
    enable_request_id_headers: bool = _option(
        False, _flag, "every answer has the header X-Request-Id, the client's own if it sent one"
    )
    access_log: bool = _option(False, _flag, "log every HTTP request, not only finished generations")
    disable_access_log_for_endpoints: list[str] = _option([], str, "path that this leaves out, may be repeated")  # noqa: RUF009
    log_level: str = _option("info", str, "debug, info, warning or error")
    chat_template: str | None = _option(None, str, "a file, or the Jinja text itself (default: the model's)")
    chat_template_content_format: str = _option(
        "string", _one_of("auto", "string", "openai"),
        "a message of several parts reaches the template as one string (auto too), or openai: as a list",
    )  # fmt: skip
    trust_request_chat_template: bool = _option(False, _flag, "a request may bring its own chat_template")
    enable_force_include_usage: bool = _option(False, _flag, "every stream ends with its usage, asked for or not")
    generation_config: str = _option(
        "auto", str, "sampling defaults: auto = the model's generation_config.json, vllm = neutral, or its folder"
    )
    override_generation_config: Any = _option(None, _object, 'of these defaults, as JSON: {"temperature": 0.5}')  # noqa: RUF009
    enable_auto_tool_choice: bool = _option(True, _flag, "the model may decide to call a tool: tool_choice auto")
    tool_call_parser: str | None = _option(
        None, _one_of(*TOOL_FORMATS), "hermes, llama3_json or mistral (default: what the chat template shows)"
    )
    tokenizer: str | None = _option(None, str, "folder of the tokenizer (default: the model's)")

    dtype: str | None = _option(None, _dtype, "auto, float32, bfloat16 or float16", engine=True)
    device: str | None = _option(None, str, "auto, cpu or cuda", engine=True)
    exact: bool | None = _option(None, _flag, "the same tokens in any batch, on a GPU too", engine=True)
    kv_cache_dtype: str | None = _option(None, _dtype, "auto, float32 or bfloat16", engine=True)
    quantization: str | None = _option(None, str, "auto, or none: int4 weights written out in dtype", engine=True)
    activation_dtype: str | None = _option(
        None, str, "what int4 and int8 weights are multiplied with: auto, int8, int12 or float", engine=True
    )
    lm_head_dtype: str | None = _option(None, str, "auto: as in the checkpoint, or int8", engine=True)
    max_model_len: int | None = _option(
        None, _model_len, "longest context in tokens; auto = what fits, 4k = 4096", engine=True
    )
    max_num_batched_tokens: int | None = _option(None, _tokens, "tokens of one step", engine=True)
    max_chunk_tokens: int | None = _option(None, _tokens, "tokens of one request in one step", engine=True)
    max_num_seqs: int | None = _option(None, int, "requests of one step", engine=True)
    max_num_queued_requests: int | None = _option(None, int, "waiting requests; more are refused with 429", engine=True)
    kv_cache_memory_bytes: int | None = _option(None, int, "memory for the KV cache (default: planned)", engine=True)
    num_blocks: int | None = _option(None, int, "blocks of the KV cache, to test preemption", engine=True)
    block_size: int | None = _option(None, int, "tokens of a block of the KV cache", engine=True)
    enable_prefix_caching: bool | None = _option(None, _flag, "share the KV of common prefixes", engine=True)
    max_logprobs: int | None = _option(None, int, "most logprobs that a request may ask for", engine=True)
    num_threads: int | None = _option(None, int, "threads (default: the physical cores)", engine=True)
    policy: str | None = _option(None, str, "fcfs or priority", engine=True)
    admission: str | None = _option(None, str, "who may start: past_future, aggressive or conservative", engine=True)
    seed: int | None = _option(None, int, "seeds requests that bring no seed", engine=True)

    def engine_options(self) -> dict[str, Any]:
        """What was set of EngineConfig."""
        names = [one.name for one in fields(self) if one.metadata["engine"]]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


_SPELLINGS = {
    "log_level": ("--log-level", "--uvicorn-log-level"),
    "quantization": ("--quantization", "-q"),
    "max_chunk_tokens": ("--max-chunk-tokens", "--long-prefill-token-threshold"),
    "policy": ("--scheduling-policy",),
    "max_num_queued_requests": ("--max-num-queued-reqs", "--max-num-queued-requests"),
    "num_blocks": ("--num-gpu-blocks-override", "--num-blocks"),
}


def _spellings(name: str) -> tuple[str, ...]:
    return _SPELLINGS.get(name, ("--" + name.replace("_", "-"),))


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model folder (Hugging Face layout, safetensors)")
    groups = {False: parser.add_argument_group("server"), True: parser.add_argument_group("engine")}
    for one in fields(ServeOptions):
        group, text = groups[one.metadata["engine"]], one.metadata["help"]
        names = _spellings(one.name)
        if one.default is not None and one.default is not False and isinstance(one.default, (str, int, float)):
            text += f" (default: {one.default})" if one.default != "" else ""
        text = f"{text} [{variable(one.name)}]".replace("%", "%%")
        if one.metadata["read"] is _flag:
            action = argparse.BooleanOptionalAction
            group.add_argument(*names, dest=one.name, action=action, default=None, help=text)
        elif isinstance(one.default_factory, type):
            read = _reader(lambda text, read=one.metadata["read"]: _list(text, read))  # type: ignore[misc]
            group.add_argument(*names, dest=one.name, type=read, action="extend", default=None, help=text)
        else:
            group.add_argument(*names, dest=one.name, type=_reader(one.metadata["read"]), default=None, help=text)
    groups[False].add_argument(
        "--disable-uvicorn-access-log", dest="access_log", action="store_false", default=None,
        help="as --no-access-log, which is the default",
    )  # fmt: skip


def _list(text: str, read: Callable[[str], Any]) -> list[Any]:
    """One value of a list, or a JSON list of all of them, as vLLM's flags have it."""
    if text.startswith("["):
        import json

        return [read(str(value)) for value in json.loads(text)]
    return [read(text)]


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
    """Flag, else environment variable, else configuration file, else default; `arguments.model` may come from the file.

    ValueError names the variable, or the line of the file, that cannot be read.
    """
    path = arguments.config or environment.get(variable("config"))
    in_file = {} if path is None else _read_file(path)
    arguments.model = arguments.model or in_file.pop("model", None)
    in_file.pop("model", None)
    values: dict[str, Any] = {}
    for one in fields(ServeOptions):
        given = getattr(arguments, one.name)
        if given is not None:
            values[one.name] = given
            continue
        text = environment.get(variable(one.name))
        if one.name == "port" and text is not None and "://" in text:
            text = None  # Kubernetes sets FASTSERVE_PORT=tcp://... for a service named fastserve
        if text is None:
            if one.name in in_file:
                values[one.name] = in_file[one.name]
            continue
        try:
            read = one.metadata["read"]
            if isinstance(one.default_factory, type):
                parts = [text] if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
                values[one.name] = [value for part in parts for value in _list(part, read)]
            else:
                values[one.name] = read(text)
        except ValueError as error:
            raise ValueError(f"environment variable {variable(one.name)}={text[:80]!r}: {error}") from None
    return ServeOptions(**values)


def _read_file(path: str) -> dict[str, Any]:
    """The options of a YAML file, by their names here, and `model`. Raises ValueError."""
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            given = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {str(error)[:300]}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must be a mapping from names of flags to values")
    known = {name.lstrip("-"): one for one in fields(ServeOptions) for name in _spellings(one.name)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("_", "-")
        if name == "model":
            values["model"] = str(value)
        elif name not in known or name == "config":
            raise ValueError(f"{path}: {str(key)[:80]!r} is no option; fastserve serve --help lists them")
        else:
            one = known[name]
            values[one.name] = _value_of(f"{path}: {key}", value, one)
    return values


def _value_of(where: str, value: Any, one: Field[Any]) -> Any:
    """A value of a YAML file, read as the flag would be."""
    import json

    def read(item: Any) -> Any:
        if isinstance(item, (list, dict)) and one.metadata["read"] is not _object:
            raise ValueError("must be one value")
        text = json.dumps(item) if isinstance(item, dict) else str(item)
        return one.metadata["read"](text)

    try:
        if isinstance(one.default_factory, type):
            return [read(item) for item in (value if isinstance(value, list) else [value])]
        return read(value)
    except ValueError as error:
        raise ValueError(f"{where}: {str(value)[:80]!r}: {error}") from None
