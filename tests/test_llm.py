# SPDX-License-Identifier: Apache-2.0
"""The offline API on a tiny model: forms of prompts, order, limits, errors, and that nothing is lost."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastserve import LLM, FastserveError, InvalidRequest, ModelLoadError, RequestOutputKind, SamplingParams
from tiny_models import make_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, block_size=16, num_blocks=24, max_num_batched_tokens=32) as llm:
        yield llm


def assert_nothing_held(llm: LLM) -> None:
    engine = llm.loaded.engine
    assert not engine.has_work
    engine.scheduler.check()
    assert engine.stats.num_used_blocks == 0


def test_prompt_forms_give_the_same_output(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The quick brown")
    forms = ["The quick brown", {"prompt": "The quick brown"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["The quick brown", "The quick brown", None, None]
    assert llm.generate("The quick brown", GREEDY, use_tqdm=False)[0].outputs == outputs[0].outputs
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs == outputs[0].outputs


def test_outputs_come_in_input_order_whatever_finishes_first(llm: LLM) -> None:
    lengths = [9, 1, 5, 2, 8, 1, 3]
    prompts = [[5 + i, 7, 9 + i] for i in range(len(lengths))]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths


def test_more_prompts_than_the_queue_holds_all_finish(tiny_dir: Path) -> None:
    with LLM(tiny_dir, num_blocks=8, max_num_queued_requests=3, max_num_seqs=2) as llm:
        outputs = llm.generate([[5 + i] for i in range(20)], GREEDY, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
        assert_nothing_held(llm)


def test_n_completions_of_a_prompt_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=8, ignore_eos=True)
    first, again = (llm.generate([7, 8, 9], params, use_tqdm=False)[0] for _ in range(2))
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in first.outputs}) > 1
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]


def test_logprobs_are_of_the_chosen_token_and_the_most_likely_ones(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate([5, 6, 7, 8], params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 4
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(position) == 3  # greedy: the chosen token is the first of the three
        assert position[token].rank == 1
        assert all(entry.logprob <= position[token].logprob for entry in position.values())
    total = sum(
        position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(p)) for p in output.prompt_logprobs[1:] if p] == [6, 7, 8]
    for position in output.prompt_logprobs[1:]:
        assert position is not None
        assert 2 <= len(position) <= 3
        assert all(math.isfinite(entry.logprob) and entry.logprob <= 0 for entry in position.values())


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    free = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    text = free[0].outputs[0].text
    assert len(text) > 6
    stop = text[3:5]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop])
    completion = llm.generate("The quick", params, use_tqdm=False)[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert_nothing_held(llm)


def test_stop_token_and_min_tokens(llm: LLM) -> None:
    tokens = llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[tokens[1]])
    completion = llm.generate([5, 6], params, use_tqdm=False)[0].outputs[0]
    assert list(completion.token_ids) == list(tokens[: list(tokens).index(tokens[1]) + 1])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[1])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[tokens[0]], min_tokens=4)
    completion = llm.generate([5, 6], params, use_tqdm=False)[0].outputs[0]
    assert len(completion.token_ids) >= 4
    assert tokens[0] not in completion.token_ids[:4]


def test_chat_uses_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    outputs = llm.chat(messages, GREEDY, use_tqdm=False)
    assert outputs[0].prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in both] == [outputs[0].outputs[0].token_ids] * 2
    assert "".join(llm.stream_chat(messages, GREEDY)) == outputs[0].outputs[0].text


def test_two_streams_of_one_engine_do_not_mix(llm: LLM) -> None:
    messages = [[{"role": "user", "content": text}] for text in ("Why?", "A river")]
    alone = ["".join(llm.stream_chat(one, GREEDY)) for one in messages]
    first, second = (llm.stream_chat(one, GREEDY) for one in messages)
    texts = ["", ""]
    for i, stream in ((0, first), (1, second), (0, first), (1, second)):
        texts[i] += next(stream, "")
    other = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    assert len(other[0].outputs[0].token_ids) == 6
    assert [texts[0] + "".join(first), texts[1] + "".join(second)] == alone
    assert_nothing_held(llm)


def test_closing_a_streamed_chat_aborts_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    pieces = llm.stream_chat([{"role": "user", "content": "Why?"}], params)
    next(pieces)
    pieces.close()
    assert_nothing_held(llm)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([5, 512], "512 at position 1.*0 to 511"),
        ([-1], "-1 at position 0"),
        ([5, True], "bool"),
        ([5, 6.0], "float"),
        ([5] * 400, "384 are allowed"),
        ({"prompt": "a", "prompt_token_ids": [5]}, "keys"),
        ({"text": "a"}, "keys"),
        (None, "NoneType"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_is_held(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([[5, 6], prompt], GREEDY, use_tqdm=False)
    assert_nothing_held(llm)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=[512]),
        SamplingParams(allowed_token_ids=[5, 600]),
        SamplingParams(logit_bias={700: 1.0}),
        SamplingParams(logprobs=21),
    ],
)
def test_parameters_beyond_the_model_are_refused(llm: LLM, params: SamplingParams) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate([5, 6], params, use_tqdm=False)
    assert_nothing_held(llm)


def test_prompt_longer_than_the_whole_cache_is_refused(tiny_dir: Path) -> None:
    with LLM(tiny_dir, block_size=16, num_blocks=2) as llm:
        with pytest.raises(InvalidRequest, match="32 are allowed"):
            llm.generate([5] * 33, GREEDY, use_tqdm=False)
        output = llm.generate([5] * 30, GREEDY, use_tqdm=False)[0]
        assert output.outputs[0].finish_reason == "length"
        assert_nothing_held(llm)


def test_unknown_options_and_remote_code_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(FastserveError, match="tensor_parallel_size"):
        LLM(tiny_dir, tensor_parallel_size=2)
    with pytest.raises(FastserveError, match="trust_remote_code"):
        LLM(tiny_dir, trust_remote_code=True)


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        LLM(folder)
    save_file({**tensors, "model.layers.0.extra": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.layers\.0\.extra"):
        LLM(folder)
    save_file({**tensors, lost: tensors[lost][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"up_proj.*shape"):
        LLM(folder)


def test_a_failing_step_ends_its_requests_with_an_error_and_the_engine_lives(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, calls = llm.loaded.runner, []
    real = runner.run

    def fails_once(plan: object) -> object:
        calls.append(plan)
        if len(calls) == 3:
            raise RuntimeError("planted fault")
        return real(plan)

    monkeypatch.setattr(runner, "run", fails_once)
    outputs = llm.generate([[5], [6, 7]], GREEDY, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"error"}
    assert "planted fault" in repr(outputs[0].error)
    assert_nothing_held(llm)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_close_frees_the_weights_and_the_cache(tiny_dir: Path) -> None:
    def live_bytes() -> int:
        gc.collect()
        # By type: isinstance() asks every lazy proxy for its class, which imports half of torch and takes seconds.
        tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    before = live_bytes()
    for _ in range(4):
        llm = LLM(tiny_dir, num_blocks=512)
        llm.generate([5, 6], GREEDY, use_tqdm=False)
        assert live_bytes() > before + 2**20
        llm.close()
        llm.close()
        with pytest.raises(FastserveError, match="closed"):
            llm.generate([5, 6], GREEDY, use_tqdm=False)
    assert live_bytes() <= before + 2**16


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    import json

    folder = make_tiny_checkpoint(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 7, "top_p": 0.5}))
    with LLM(folder) as llm:
        params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 7, 0.5)
    assert params.output_kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize("block_size", [1, 8, 20, 512])
def test_a_block_size_that_attention_cannot_take_is_refused_at_start(tiny_dir: Path, block_size: int) -> None:
    with pytest.raises(
        FastserveError, match=rf"block_size={block_size} is not available on the CPU; use a multiple of 16"
    ):
        LLM(tiny_dir, block_size=block_size)


@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_any_block_size_that_is_accepted_works(tiny_dir: Path, block_size: int) -> None:
    with LLM(tiny_dir, block_size=block_size) as llm:
        output = llm.generate([5, 6], GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].finish_reason == "length"
