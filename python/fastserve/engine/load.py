# SPDX-License-Identifier: Apache-2.0
"""From a model folder and options to an engine that is ready: the one place where the parts are put together.

And where torch is imported, not before: what reads this file may never make an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.config import EngineConfig, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.engine.memory import give_back_freed_memory
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.inputs import Prompt, as_prompt
from fastserve.model_config import ModelConfig
from fastserve.structured import GrammarCompiler
from fastserve.tokenizer import Tokenizer
from fastserve.torch_ahead import load_torch_ahead

if TYPE_CHECKING:
    from fastserve.engine.runner import ModelRunner


@dataclass
class LoadedEngine:
    """An engine with what surrounds it. `close` frees the model and the cache."""

    engine: Engine
    runner: ModelRunner
    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    grammars: GrammarCompiler | None = None
    content_parts: bool = False  # chat templates get the content of messages as lists of parts

    def check_structure(self, params: SamplingParams) -> None:
        """Compiles what the output must match, which may take a while. Raises InvalidRequest if it cannot be."""
        if params.structured_outputs is not None:
            if self.grammars is None:
                raise InvalidRequest("structured outputs need a tokenizer; this engine has none")
            self.grammars.check(params.structured_outputs)

    def prompt(self, given: Any, *, add_special_tokens: bool = True) -> Prompt:
        return as_prompt(given, self.tokenizer, self.model_config.vocab_size, add_special_tokens=add_special_tokens)

    def default_sampling_params(self) -> SamplingParams:
        """The defaults of SamplingParams with what the model's generation_config.json sets."""
        defaults = dataclasses.asdict(self.model_config.generation)
        max_tokens = defaults.pop("max_new_tokens")
        given = {name: value for name, value in defaults.items() if value is not None}
        return SamplingParams(**given, **({} if max_tokens is None else {"max_tokens": max_tokens}))

    def close(self) -> None:
        self.runner.close()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's garbage collections: an import of torch makes a million objects that stay, and every collection
    looks at all there are, 0.1 to 0.3 s in total. Afterwards they count as old, as they would have before long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def load_engine(
    model: str | Path,
    tokenizer: str | Path | None,
    *,
    skip_tokenizer_init: bool,
    options: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> LoadedEngine:
    """Options are the fields of EngineConfig. Raises FastserveError (ModelLoadError for the model folder)."""
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown := sorted(options.keys() - known):
        raise FastserveError(f"unknown option {unknown[0]!r}; options are {', '.join(sorted(known))}")
    config = EngineConfig(**options)
    with _no_collections():
        load_torch_ahead()
        ModelConfig.from_dir(model)  # what is wrong with the folder is said before what is wrong with its tokenizer
        text_tokenizer = None if skip_tokenizer_init else Tokenizer.from_dir(tokenizer or model)  # meanwhile
        from fastserve.engine.runner import ModelRunner

        runner = ModelRunner(model, config, progress)
    engine = Engine(config, runner, time.monotonic, text_tokenizer)
    grammars = None
    if text_tokenizer is not None:
        grammars = GrammarCompiler(text_tokenizer, runner.vocab_size, runner.eos_token_ids)
        runner.sampler.grammars = grammars
        runner.sampler.encode = lambda text: text_tokenizer.encode(text, False)
    give_back_freed_memory()
    return LoadedEngine(engine, runner, config, runner.model_config, text_tokenizer, grammars)
