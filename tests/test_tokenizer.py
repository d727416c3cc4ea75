# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: as transformers reads them, and incremental decoding that equals decoding at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from transformers import AutoTokenizer

from fastserve.errors import InvalidRequest, ModelLoadError
from fastserve.tokenizer import IncrementalDetokenizer, Tokenizer
from tiny_models import TEXT, byte_level_tokenizer, sentencepiece_tokenizer, write_tokenizer

MIXED = "12345 über naïve 你好世界 👩‍👩‍👧 🙂 <|im_end|>\n\t x  y é \u200d"


def odd_byte_level() -> tokenizers.Tokenizer:
    """Byte level with added tokens that are plain text, not spelled bytes."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["two words", "é", "Ġx", "日本", AddedToken("<tool>", normalized=False)])
    return tokenizer


def spaces() -> tokenizers.Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))


BUILDERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level_tokenizer,
    "odd_byte_level": odd_byte_level,
    "byte_fallback": sentencepiece_tokenizer,
    "metaspace": lambda: sentencepiece_tokenizer(byte_fallback=False),
    "spaces": spaces,
}
_built: dict[str, Tokenizer] = {}


def tiny(kind: str) -> Tokenizer:
    if kind not in _built:
        _built[kind] = Tokenizer(BUILDERS[kind]())
    return _built[kind]


def incremental(tokenizer: Tokenizer, ids: list[int], skip: bool, prompt: list[int] | None = None) -> str:
    """The joined pieces; each piece is checked to be whole."""
    stream = IncrementalDetokenizer(tokenizer, skip, prompt or [])
    pieces = [stream.push(token_id) for token_id in ids]
    pieces.append(stream.flush())
    "".join(pieces).encode("utf-8")  # no half of anything
    for first in {0, len(ids) // 2}:  # the rest at once
        late = IncrementalDetokenizer(tokenizer, skip, prompt or [])
        begin = "".join([late.push(token_id) for token_id in ids[:first]])
        assert begin + late.flush(ids[first:]) == "".join(pieces)
    return "".join(pieces)


@pytest.mark.parametrize("kind", BUILDERS)
def test_any_ids_in_any_order(kind: str) -> None:
    """Ids beyond the vocabulary included: models pad theirs, and may sample such a row."""
    tokenizer = tiny(kind)
    ids_of = st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40)

    @settings(max_examples=300, deadline=None, database=None)
    @given(ids=ids_of, skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert incremental(tokenizer, ids, skip) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("kind", ["byte_level", "odd_byte_level", "byte_fallback"])
def test_any_bytes(kind: str) -> None:
    """Sequences of single-byte tokens: valid, broken and overlong UTF-8 alike."""
    tokenizer = tiny(kind)
    if kind == "byte_fallback":
        byte_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    else:
        id_of_byte = {tokenizer.token_bytes(i): i for i in range(5, 5 + 256)}
        byte_ids = [id_of_byte[bytes([byte])] for byte in range(256)]
    letter = tokenizer.token_to_id("a")
    chunk = st.one_of(st.binary(max_size=6), st.text(max_size=3).map(lambda text: text.encode("utf-8")), st.none())

    @settings(max_examples=400, deadline=None, database=None)
    @given(chunks=st.lists(chunk, max_size=8))
    def check(chunks: list[bytes | None]) -> None:
        ids = [i for part in chunks for i in ([letter] if part is None else [byte_ids[byte] for byte in part])]
        assert incremental(tokenizer, ids, True) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", BUILDERS)
def test_text_after_a_prompt_continues_it(kind: str) -> None:
    tokenizer = tiny(kind)
    rng = random.Random(3)
    prompt = tokenizer.encode(TEXT[0])
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(10)]
        whole = tokenizer.decode(prompt + ids)
        assert tokenizer.decode(prompt) + incremental(tokenizer, ids, True, prompt) == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_the_space_between_prompt_and_continuation_is_kept(kind: str) -> None:
    tokenizer = tiny(kind)
    ids = tokenizer.encode("The quick brown fox")
    for cut in range(1, len(ids)):
        tail = incremental(tokenizer, ids[cut:], True, ids[:cut])
        assert tokenizer.decode(ids[:cut]) + tail == "The quick brown fox"


def test_characters_come_whole_and_as_soon_as_they_are() -> None:
    tokenizer = tiny("byte_level")
    stream = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("a👩é")
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == "a👩é"
    assert "�" not in "".join(pieces)
    assert all(piece in ("", "a", "👩", "é") for piece in pieces)
    assert stream.flush() == ""


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    tokenizer = tiny("byte_level")
    ids = tokenizer.encode("👩")[:-1]
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.push(token_id) for token_id in ids) == ""
    assert stream.flush() == "�"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_the_cost_per_token_does_not_grow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts decoded ids instead of taking the time: they stay proportional to the length."""
    tokenizer = tiny(kind)
    decoded = 0
    original = Tokenizer.decode

    def counting(self: Tokenizer, ids: Any, skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    rng = random.Random(5)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(3000)]
    stream = IncrementalDetokenizer(tokenizer, prompt_token_ids=ids[:500])
    for token_id in ids:
        stream.push(token_id)
    assert decoded <= 4 * len(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_special_tokens_around_a_text(tmp_path: Path, kind: str, flags: dict[str, bool]) -> None:
    tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path, BUILDERS[kind](), **flags))
    inner = tokenizer.encode("over the", add_special_tokens=False)
    default_bos = kind != "byte_level"  # what the post-processor of the tokenizer.json says
    expected = ([1] if flags.get("add_bos_token", default_bos) else []) + inner
    assert tokenizer.encode("over the") == expected + ([2] if flags.get("add_eos_token") else [])
    empty = tokenizer.encode("")
    assert empty == [i for i in expected if i not in inner] + ([2] if flags.get("add_eos_token") else [])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_same_ids_as_transformers(tmp_path: Path, kind: str) -> None:
    folder = write_tokenizer(tmp_path, BUILDERS[kind]())
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_dir(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    assert tokenizer.vocab_size == len(reference)
    for text in [*TEXT, MIXED, "", " ", "</s>tail"]:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
        ids = tokenizer.encode(text, add_special_tokens=False)
        for skip in (True, False):
            reference_text = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip) == reference_text


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]


def test_tokens_and_ids(tmp_path: Path) -> None:
    tokenizer = tiny("byte_level")
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.token_to_id("<s>") == 1
    assert tokenizer.id_to_token(1) == "<s>"
    assert tokenizer.token_to_id("no such token") is None
    for text in TEXT:
        assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)).decode() == text


def test_chat_templates(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template="A")
    assert Tokenizer.from_dir(folder).chat_template == "A"
    named = [{"name": "default", "template": "B"}, {"name": "tool_use", "template": "C"}]
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=named)
    assert Tokenizer.from_dir(folder).chat_templates == {"default": "B", "tool_use": "C"}
    (folder / "chat_template.jinja").write_text("D")
    assert Tokenizer.from_dir(folder).chat_template == "D"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_dir(folder)
    assert (bare.chat_template, bare.bos_token_id, bare.eos_token) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": 7}, "bos_token must be a string"),
        ({"bos_token": {"text": "<s>"}}, None),  # an object without content names no token
        ({"eos_token": {"content": ["</s>"]}}, "eos_token must be a string"),
        ({"eos_token": "<never seen>"}, r"eos_token must be a token of tokenizer\.json"),
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false"),
        ({"chat_template": 5}, "chat_template must be a string or a list"),
        ({"chat_template": [{"name": "default"}]}, "chat_template must be a string or a list"),
        ({"chat_template": [[1, 2]]}, "chat_template must be a string or a list"),
        ({"chat_template": "x" * (2**20 + 1)}, "at most 1048576 are allowed"),
    ],
)
def test_lies_in_the_tokenizer_config(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    folder = write_tokenizer(tmp_path, byte_level_tokenizer(), **changes)
    if message is None:
        assert Tokenizer.from_dir(folder).bos_token is None
    else:
        with pytest.raises(ModelLoadError, match=message):
            Tokenizer.from_dir(folder)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json; text prompts need one"):
        Tokenizer.from_dir(tmp_path)
    good = json.loads(byte_level_tokenizer().to_str())
    bad_merge = {**good, "model": {**good["model"], "merges": [["nothing", "here"]]}}
    bad_id = {**good, "model": {**good["model"], "vocab": {"a": -1}}}
    for broken in ("", "{", "[]", "{}", json.dumps(good)[:-20], json.dumps(bad_merge), json.dumps(bad_id)):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
            Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Replace("a", "b"), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    ],
    ids=["wordpiece", "replace after fuse", "strip at the end", "strip two"],
)
def test_a_decoder_that_cannot_be_followed_is_refused(decoder: Any) -> None:
    backend = byte_level_tokenizer()
    backend.decoder = decoder
    with pytest.raises(ModelLoadError, match="known are ByteLevel"):
        Tokenizer(backend)


def test_text_that_is_no_text() -> None:
    tokenizer = tiny("byte_level")
    with pytest.raises(InvalidRequest, match="must be a str, got bytes"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="half of a surrogate pair at 2"):
        tokenizer.encode("ab\ud83d")
