# SPDX-License-Identifier: Apache-2.0
"""From sampled tokens to outputs: text, stop strings, logprobs, output kinds, several completions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_device import ByteDetokenizer, ByteTokenizer, ScriptedDevice
from fastserve.config import EngineConfig, RequestOutputKind, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.engine.stop_strings import StopMatcher

DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


def make_engine(script, *, kv="native", **config):
    from fastserve.engine.scheduler import Scheduler
    from fastserve.policies import fcfs
    from scheduler_harness import KV_FACTORIES

    device = ScriptedDevice({name: list(text) for name, text in script.items()})
    config = EngineConfig(**config)
    pool, tree = KV_FACTORIES[kv](64, config.block_size, True)
    scheduler = Scheduler(config, 64, 64, device.eos_token_ids, fcfs, pool=pool, tree=tree)
    ticks = iter(range(10**6))
    return Engine(
        config,
        device,
        lambda: float(next(ticks)),
        ByteTokenizer(),
        scheduler=scheduler,
        make_detokenizer=ByteDetokenizer,
    )


def run(text, *, prompt=(1, 2, 3), config=None, **params):
    """All outputs of one request whose sampled bytes are `text` (it ends there at the latest)."""
    script = text if isinstance(text, dict) else {"r": text}
    engine = make_engine(script, **(config or {}))
    longest = max(len(one) for one in script.values())
    engine.add_request("r", prompt, SamplingParams(**{"max_tokens": longest, **params}), prompt="a prompt")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.stats.num_used_blocks == 0
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs


def final(text, **more):
    output = run(text, output_kind=FINAL, **more)
    assert len(output) == 1
    return output[0].outputs[0]


# -- stop strings alone ------------------------------------------------------------------------------------------


def first_stop(text, stops, armed_from=0):
    """By definition: the stop string that is complete first; of those that end together, the longest."""
    for end in range(armed_from + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


AB = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=5), max_size=12), STOPS, st.booleans(), st.integers(0, 12))
def test_stop_matcher_equals_its_definition(pieces, stops, include, armed_piece):
    matcher, text, shown, stop = StopMatcher(tuple(stops), include), "", "", None
    armed_from = sum(map(len, pieces[:armed_piece]))
    for i, piece in enumerate(pieces):
        text += piece
        new, stop = matcher.push(piece, armed=i >= armed_piece)
        shown += new
        if stop is not None:
            break
        held = 0 if include else max(n for n in range(6) if any(text.endswith(s[:n]) and n <= len(s) for s in stops))
        assert shown == text[: len(text) - held], "holds back what may become a stop string, and nothing else"
    expected = first_stop(text, stops, armed_from)
    if expected is None:
        assert stop is None
        assert shown + matcher.flush() == text
    else:
        end, expected_stop = expected
        assert stop == expected_stop
        assert shown == text[: end if include else end - len(stop)]
        assert matcher.flush() == ""


def test_stop_matcher_takes_a_long_hostile_text():
    matcher = StopMatcher(("a" * 255 + "b", "a" * 200 + "c"), False)
    shown = sum(len(matcher.push("a" * 100)[0]) for _ in range(2000))
    assert shown == 200_000 - 255
    assert matcher.push("b") == ("", "a" * 255 + "b")


# -- stop strings in requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "text", "num_tokens"), [(False, "one ", 7), (True, "one END", 7)], ids=["left out", "included"]
)
def test_a_stop_string_ends_the_text(include, text, num_tokens):
    completion = final(b"one END two", stop=["two", "END"], include_stop_str_in_output=include)
    assert completion.text == text
    assert len(completion.token_ids) == num_tokens
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "END")


def test_streams_never_show_part_of_a_stop_string():
    outputs = run(b"xE ENx END", stop="END", output_kind=DELTA)
    assert [output.outputs[0].text for output in outputs] == ["x", "", "E ", "", "", "ENx", " ", "", "", ""]
    assert outputs[-1].outputs[0].stop_reason == "END"


def test_text_held_back_comes_at_the_end():
    outputs = run(b"abEN", stop="END", output_kind=DELTA)
    assert [output.outputs[0].text for output in outputs] == ["a", "b", "", "EN"]
    assert outputs[-1].outputs[0].finish_reason == "length"


def test_a_stop_string_on_the_last_token_wins_over_length():
    completion = final(b"abEND", stop="END", max_tokens=5)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ab", "stop", "END")


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (3, "a"), (4, "aEND b"), (8, "aEND b"), (9, "aEND bEND")])
def test_min_tokens_lets_stop_strings_pass(min_tokens, text):
    assert final(b"aEND bEND", stop="END", min_tokens=min_tokens).text == text


def test_min_tokens_up_to_the_end_of_a_stop_string():
    # The token that completes it must come after min_tokens.
    assert final(b"aENDb", stop="END", min_tokens=3).text == "a"
    assert final(b"aENDb", stop="END", min_tokens=4).text == "aENDb"


@given(AB, STOPS, st.sampled_from([DELTA, CUMULATIVE, FINAL]), st.booleans())
def test_all_kinds_tell_the_same_text(text, stops, kind, include):
    text += "x"
    outputs = run(text.encode(), stop=stops, output_kind=kind, include_stop_str_in_output=include)
    expected = first_stop(text, stops)
    end, stop = expected or (len(text), "")
    wanted = text[: end if include else end - len(stop)]
    texts = [output.outputs[0].text for output in outputs]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    if kind is DELTA:
        assert "".join(texts) == wanted
        assert tokens == [[byte] for byte in text[:end].encode()]
    else:
        assert texts[-1] == wanted
        assert bytes(tokens[-1]).decode() == text[:end]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert outputs[-1].outputs[0].stop_reason == (stop or None)


# -- tokens that end a request -----------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_eos_is_a_token_but_no_text(include):
    completion = final(b"hi\0", include_stop_str_in_output=include)
    assert (completion.text, list(completion.token_ids)) == ("hi", [*b"hi\0"])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert completion.finished()


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi!")])
def test_a_stop_token_is_text_only_if_asked(include, text):
    completion = final(b"hi!", stop_token_ids=[ord("!")], include_stop_str_in_output=include)
    assert (completion.text, completion.stop_reason) == (text, ord("!"))
    assert list(completion.token_ids) == [*b"hi!"]


BYTES = st.binary(min_size=1, max_size=12).map(lambda text: text.replace(b"\xff", b"\xc3"))


@given(BYTES, st.booleans(), st.booleans(), st.sampled_from([None, 1, 5]))
def test_text_made_at_the_end_is_the_streamed_text(text, include, skip_special, abort_at):
    def outputs_of(kind):
        engine = make_engine({"r": text})
        params = SamplingParams(
            max_tokens=len(text),
            stop_token_ids=[ord("a")],
            include_stop_str_in_output=include,
            skip_special_tokens=skip_special,
            output_kind=kind,
        )
        engine.add_request("r", [1], params)
        outputs = []
        while engine.has_work:
            if engine.stats.num_steps == abort_at:
                engine.abort("r")
            outputs += engine.step()
        return [output.outputs[0] for output in outputs]

    (late,), streamed = outputs_of(FINAL), outputs_of(DELTA)
    assert late.text == "".join(output.text for output in streamed)
    assert list(late.token_ids) == [token for output in streamed for token in output.token_ids]
    assert late.finish_reason == streamed[-1].finish_reason


def test_an_abort_succeeds_although_the_text_cannot_be_made():
    engine = make_engine({"r": b"ab\xffc"})
    engine.add_request("r", [1], SamplingParams(max_tokens=9, output_kind=FINAL))
    for _ in range(3):
        assert engine.step() == []
    assert engine.abort("r")
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "abort"
    assert isinstance(output.error, ValueError)
    assert not engine.has_work


def test_special_tokens_are_text_if_asked():
    assert final(b"a\0b", ignore_eos=True, skip_special_tokens=False).text == "a\0b"
    assert final(b"a\0b", ignore_eos=True).text == "ab"


def test_half_a_character_is_never_shown():
    outputs = run("aé€".encode(), output_kind=DELTA)
    assert [output.outputs[0].text for output in outputs] == ["a", "", "é", "", "", "€"]
    cut = run("a€".encode()[:-1], output_kind=DELTA)
    assert [output.outputs[0].text for output in cut] == ["a", "", "\ufffd"]


def test_without_detokenize_there_is_no_text():
    completion = final(b"abc", detokenize=False, logprobs=0)
    assert completion.text == ""
    assert list(completion.token_ids) == [*b"abc"]
    assert completion.logprobs[0][ord("a")].decoded_token is None


# -- logprobs ----------------------------------------------------------------------------------------------------


def test_logprobs_have_rank_text_and_sum():
    completion = final(b"\2\1b", logprobs=2)
    assert [list(position) for position in completion.logprobs] == [[2, 1], [1, 2], [ord("b"), 1, 2]]
    chosen = completion.logprobs[2][ord("b")]
    assert (chosen.logprob, chosen.rank, chosen.decoded_token) == (-98 / 8, 98, "b")
    assert completion.cumulative_logprob == -(2 + 1 + 98) / 8


def test_logprobs_follow_the_output_kind():
    deltas = run(b"abc", logprobs=0, output_kind=DELTA)
    assert [[list(p) for p in o.outputs[0].logprobs] for o in deltas] == [[[97]], [[98]], [[99]]]
    assert [o.outputs[0].cumulative_logprob for o in deltas] == [-97 / 8, -195 / 8, -294 / 8]
    assert [len(o.outputs[0].logprobs) for o in run(b"abc", logprobs=0)] == [1, 2, 3]


def test_no_logprobs_unless_asked():
    completion = final(b"ab")
    assert completion.logprobs is None
    assert completion.cumulative_logprob is None


@pytest.mark.parametrize("budget", [1, 2, 3, 64])
def test_prompt_logprobs_come_from_all_chunks(budget):
    outputs = run(b"xy", prompt=[5, 6, 7, 8], prompt_logprobs=1, config={"max_num_batched_tokens": budget})
    for output in outputs:
        assert output.prompt_logprobs[0] is None
        assert [list(position) for position in output.prompt_logprobs[1:]] == [[6, 1], [7, 1], [8, 1]]
        assert output.prompt_logprobs[1][6].logprob == -6 / 8


def test_deltas_tell_prompt_logprobs_once():
    outputs = run(b"xyz", prompt_logprobs=0, output_kind=DELTA)
    assert [output.prompt_logprobs is None for output in outputs] == [False, True, True]


# -- several completions -----------------------------------------------------------------------------------------


def test_n_completions_come_in_one_output_in_order():
    outputs = run({"r#0": b"abcde", "r#1": b"x\0", "r#2": b"uvEND"}, n=3, stop="END", output_kind=FINAL)
    assert len(outputs) == 1
    assert [c.index for c in outputs[0].outputs] == [0, 1, 2]
    assert [c.text for c in outputs[0].outputs] == ["abcde", "x", "uv"]
    assert [c.finish_reason for c in outputs[0].outputs] == ["length", "stop", "stop"]


def test_n_completions_stream_cumulatively():
    outputs = run({"r#0": b"abc", "r#1": b"x\0"}, n=2, max_tokens=3)
    assert [[c.text for c in output.outputs] for output in outputs] == [["a", "x"], ["ab", "x"], ["abc", "x"]]
    assert [[c.finish_reason for c in output.outputs] for output in outputs] == [
        [None, None],
        [None, "stop"],
        ["length", "stop"],
    ]


def test_n_completions_stream_deltas_of_those_that_moved():
    outputs = run({"r#0": b"abc", "r#1": b"x\0"}, n=2, max_tokens=3, output_kind=DELTA)
    assert [[(c.index, c.text) for c in output.outputs] for output in outputs] == [
        [(0, "a"), (1, "x")],
        [(0, "b"), (1, "")],
        [(0, "c")],
    ]


def test_prompt_logprobs_are_computed_once_for_n():
    (output,) = run({"r#0": b"a", "r#1": b"b"}, n=2, prompt_logprobs=0, output_kind=FINAL)
    assert len(output.prompt_logprobs) == 3


def test_outputs_carry_the_request():
    (output,) = run(b"ab", output_kind=FINAL)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "a prompt", [1, 2, 3])
    assert output.num_cached_tokens == 0
    metrics = output.metrics
    times = [
        metrics.arrival_s,
        metrics.first_scheduled_s,
        metrics.first_token_s,
        metrics.last_token_s,
        metrics.finished_s,
    ]
    assert times == sorted(set(times)), "one after the other"
