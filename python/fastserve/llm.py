# SPDX-License-Identifier: Apache-2.0
"""The offline API: many prompts in, their completions out, in the same order."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastserve.config import RequestOutputKind, SamplingParams
from fastserve.engine.load import LoadedEngine, load_engine
from fastserve.engine.prefix_plan import PrefixPlan, plan_prefixes, unplanned
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.inputs import Prompt, as_params_list, as_prompt_list, is_conversation
from fastserve.outputs import RequestOutput
from fastserve.tokenizer import Tokenizer


class LLM:
    """A model, its tokenizer and an engine, for use from one thread.

    `model` is a Hugging Face folder with safetensors. `options` are the fields of `fastserve.config.EngineConfig`
    (max_model_len, max_num_batched_tokens, dtype, num_threads, ...). Use as a context manager, or call `close()`:
    it frees the weights and the KV cache at once. Raises ModelLoadError or FastserveError.

        with LLM("models/smollm2-135m") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0)):
                print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        show_progress: bool = False,
        **options: Any,
    ) -> None:
        if trust_remote_code:
            raise FastserveError("trust_remote_code is not supported: no code from a model folder ever runs")
        from tqdm import tqdm

        with tqdm(desc="Loading", unit="layer", disable=not show_progress, leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._loaded: LoadedEngine | None = load_engine(
                model, tokenizer, skip_tokenizer_init=skip_tokenizer_init, options=options, progress=progress
            )
        if show_progress:
            tqdm.write(self._loaded.runner.memory_plan.table())
        self._ids = itertools.count()
        self._inbox: dict[str, deque[RequestOutput]] = {}  # by request, what step() gave and nobody has taken

    @property
    def loaded(self) -> LoadedEngine:
        """The engine and its parts; raises FastserveError after close()."""
        if self._loaded is None:
            raise FastserveError("this LLM is closed")
        return self._loaded

    # -- completions --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}; `prompts` is one
        or a list of them. `sampling_params` is one for all or one for each; None takes the model's defaults.
        Raises InvalidRequest before anything runs if a prompt or parameter is not acceptable. A request that
        fails later has finish_reason "error"; the others are unaffected.
        """
        given = as_prompt_list(prompts)
        params = as_params_list(sampling_params, len(given), self.get_default_sampling_params())
        return self._run([self.loaded.prompt(one) for one in given], params, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"} messages) or a list of them.

        The model's own chat template is used unless one is given. None as `sampling_params` takes the model's
        defaults with max_tokens up to the context's end.
        """
        conversations = [messages] if is_conversation(messages) else list(messages)
        default = replace(self.get_default_sampling_params(), max_tokens=None)
        params = as_params_list(sampling_params, len(conversations), default)
        prompts = [
            self._chat_prompt(one, chat_template, add_generation_prompt, tools, chat_template_kwargs)
            for one in conversations
        ]
        return self._run(prompts, params, use_tqdm)

    def stream_chat(self, messages: Any, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Answer one conversation piece by piece: yields new text as it is made. Closing the iterator aborts."""
        params = sampling_params or replace(self.get_default_sampling_params(), max_tokens=None)
        params = replace(params, output_kind=RequestOutputKind.DELTA)
        if params.n != 1:
            raise InvalidRequest(f"n={params.n} is not allowed when streaming a chat; it must be 1")
        prompt = self._chat_prompt(messages, None, True, None, None)
        request_id = self._add(prompt, params)
        try:
            for output in self._outputs_of(request_id):
                for completion in output.outputs:
                    if completion.finish_reason == "error":
                        raise FastserveError(f"the request failed: {output.error!r}") from output.error
                    if completion.text:
                        yield completion.text
        finally:
            self._end(request_id)

    # -- the model ----------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """Raises FastserveError when the engine was made with skip_tokenizer_init=True."""
        if self.loaded.tokenizer is None:
            raise FastserveError("this LLM has no tokenizer (skip_tokenizer_init=True)")
        return self.loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with what the model's generation_config.json sets; other fields at their defaults."""
        return self.loaded.default_sampling_params()

    def close(self) -> None:
        """Free the weights, the KV cache and the buffers. A second call does nothing."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _chat_prompt(
        self,
        messages: Any,
        chat_template: str | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        kwargs: dict[str, Any] | None,
    ) -> Prompt:
        from fastserve.chat_template import render_chat

        tokenizer = self.get_tokenizer()
        template = chat_template if chat_template is not None else tokenizer.chat_template
        if template is None:
            raise InvalidRequest("this model has no chat template; give one as chat_template, or use generate()")
        text = render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            **(kwargs or {}),
        )
        # The template has written the special tokens already.
        return self.loaded.prompt(text, add_special_tokens=False)

    def _add(self, prompt: Prompt, params: SamplingParams, **more: Any) -> str:
        request_id = str(next(self._ids))
        self.loaded.engine.add_request(request_id, prompt.token_ids, params, prompt=prompt.text, **more)
        self._inbox[request_id] = deque()
        return request_id

    def _step(self) -> list[str]:
        """One engine step; each output goes to the call that waits for it, of which there may be several. Returns the
        ids of their requests."""
        outputs = self.loaded.engine.step()
        for output in outputs:
            self._inbox[output.request_id].append(output)
        return [output.request_id for output in outputs]

    def _outputs_of(self, request_id: str) -> Iterator[RequestOutput]:
        inbox, finished = self._inbox[request_id], False
        while not finished:
            while not inbox:
                self._step()
            output = inbox.popleft()
            finished = output.finished
            yield output

    def _end(self, request_id: str) -> None:
        if self._loaded is not None:
            self._loaded.engine.discard(request_id)
        self._inbox.pop(request_id, None)

    def _run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        """Feed the bounded queue as it empties, step until all have ended, and put the outputs in order.

        The prompts run in the order in which each prefix that they share is computed once.
        """
        engine, limit = self.loaded.engine, self.loaded.config.max_num_queued_requests
        params = [replace(one, output_kind=RequestOutputKind.FINAL_ONLY) for one in params]
        for prompt, one in zip(prompts, params, strict=True):
            engine.check_request(prompt.token_ids, one)
            self.loaded.check_structure(one)
        plan = self._plan(prompts, params)
        first, num_added = engine.num_added, 0
        open_ids: dict[str, int] = {}  # of the requests that have not finished: their place
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        progress = _Progress(len(prompts), use_tqdm)
        places = iter(plan.order)
        place = next(places, -1)
        try:
            while num_added < len(prompts) or open_ids:
                while num_added < len(prompts) and engine.num_waiting + params[place].n <= limit:
                    request_id = self._add(
                        prompts[place], params[place], index=first + place, shared_prefix=plan.prefix_of[place]
                    )
                    open_ids[request_id] = place
                    num_added += 1
                    place = next(places, -1)
                for request_id in self._step():
                    if request_id in open_ids:
                        output = self._inbox.pop(request_id).popleft()
                        outputs[open_ids.pop(request_id)] = output
                        progress.finished(output)
        finally:
            progress.close()
            for request_id in open_ids:
                self._end(request_id)
            if self._loaded is not None:
                engine.end_batch(plan.prefixes)
        return [output for output in outputs if output is not None]

    def _plan(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> PrefixPlan:
        config = self.loaded.config
        if len(prompts) < 2 or config.batch_order == "arrival" or not config.enable_prefix_caching:
            return unplanned(len(prompts))
        return plan_prefixes([prompt.token_ids for prompt in prompts], params, config.block_size)


class _Progress:
    """A bar over prompts that shows token rates, and how much of the prompts was not computed but shared."""

    def __init__(self, num_prompts: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=num_prompts, desc="Prompts", unit="prompt", disable=not enabled)
        self._begin = time.monotonic()
        self._prompt_tokens = self._output_tokens = self._shared_tokens = 0

    def finished(self, output: RequestOutput) -> None:
        self._prompt_tokens += len(output.prompt_token_ids)
        self._shared_tokens += output.num_cached_tokens or 0
        self._output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._prompt_tokens / elapsed:.0f} tok/s, out {self._output_tokens / elapsed:.0f} tok/s, "
            f"shared {self._shared_tokens / max(self._prompt_tokens, 1):.0%}",
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
