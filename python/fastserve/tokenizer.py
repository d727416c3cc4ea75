# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, by the `tokenizers` library, plus decoding that follows a growing sequence."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fastserve.errors import InvalidRequest, ModelLoadError
from fastserve.json_file import Fields, read_bytes, read_json_object

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 2**20


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, with what tokenizer_config.json says about it.

    Attributes: bos_token, eos_token, unk_token, pad_token (str or None), their ids bos_token_id,
    eos_token_id, and chat_templates (name -> Jinja text; "default" is the usual one).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, where: str = "") -> None:
        fields = Fields(where or TOKENIZER_CONFIG_FILE, config or {})
        # A tokenizer.json may carry the truncation and padding of its training run; a prompt must stay whole.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token = _special_token(fields, "bos_token")
        self.eos_token = _special_token(fields, "eos_token")
        self.unk_token = _special_token(fields, "unk_token")
        self.pad_token = _special_token(fields, "pad_token")
        self.bos_token_id = self._id_of(fields, "bos_token", self.bos_token)
        self.eos_token_id = self._id_of(fields, "eos_token", self.eos_token)
        self.chat_templates = _chat_templates(fields)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._affixes = self._explicit_affixes(fields)
        self._decoder = _decoder_spec(backend, fields.where)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> Tokenizer:
        """Raises ModelLoadError when tokenizer.json is missing or broken."""
        folder = Path(model_dir)
        path = folder / TOKENIZER_FILE
        if not path.exists():
            raise ModelLoadError(
                f"{folder}: no {TOKENIZER_FILE}; text prompts need one (prompts given as token ids do not)"
            )
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_bytes(path))
        except ModelLoadError:
            raise
        except BaseException as error:  # the library raises plain Exception, and a panic is a BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelLoadError(f"{path}: not a tokenizer that can be read: {error}") from None
        config_path = folder / TOKENIZER_CONFIG_FILE
        config = read_json_object(config_path, allow_nan=True) if config_path.exists() else {}
        template_path = folder / CHAT_TEMPLATE_FILE
        if template_path.exists():  # the newer home of the template; it wins over the one in the JSON file
            try:
                config["chat_template"] = read_bytes(template_path, MAX_TEMPLATE_BYTES).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ModelLoadError(f"{template_path}: not UTF-8: {error}") from None
        return cls(backend, config, str(config_path))

    def _id_of(self, fields: Fields, key: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise fields.error(key, f"a token of {TOKENIZER_FILE}")
        return int(token_id)

    def _explicit_affixes(self, fields: Fields) -> tuple[list[int], list[int]] | None:
        """The ids that add_bos_token and add_eos_token demand around a text; None to leave it to
        tokenizer.json.

        Files are at odds about this in practice; an explicit flag counts more than the post-processor.
        """
        if not fields.has("add_bos_token") and not fields.has("add_eos_token"):
            return None
        inner = self._ids("a", add_special_tokens=False)
        outer = self._ids("a", add_special_tokens=True)
        start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
        before, after = outer[:start], outer[start + len(inner) :]
        if fields.has("add_bos_token"):
            add = fields.boolean("add_bos_token", False)
            before = [self.bos_token_id] if add and self.bos_token_id is not None else []
        if fields.has("add_eos_token"):
            add = fields.boolean("add_eos_token", False)
            after = [self.eos_token_id] if add and self.eos_token_id is not None else []
        return before, after

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's own vocabulary is often padded beyond it."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids, as in transformers.

        add_special_tokens=False for text that a chat template already gave its special tokens.
        Raises InvalidRequest when the text is not a str of valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"a text prompt must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text holds half of a surrogate pair at {error.start}") from None
        if not add_special_tokens or self._affixes is None:
            return self._ids(text, add_special_tokens=add_special_tokens)
        before, after = self._affixes
        return [*before, *self._ids(text, add_special_tokens=False), *after]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids without a token (the padding of a model's vocabulary) decode to nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (for example 'Ġthe'), None for an id without a token."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def is_byte_level(self) -> bool:
        """Whether tokens spell bytes (GPT-2 style), so that decoding is concatenation of bytes."""
        return self._decoder == "bytes"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, none if there is no such token; only for a byte-level tokenizer."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.id_to_token(token_id) or ""
            try:
                found = bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token that is plain text
                found = token.encode("utf-8")
            self._bytes[token_id] = found
        return found


class IncrementalDetokenizer:
    """Decodes a growing sequence: whatever way ids arrive, the emitted pieces join to the one-shot decode.

    A piece is emitted as soon as no later token can change it, so text never contains half a character. The
    cost per token does not grow with the length of the sequence.

    `prompt_token_ids` are the ids before the first pushed one. They are not emitted; they matter to
    tokenizers whose first token drops its leading space: with them, decode(prompt + ids) == decode(prompt) +
    emitted text (for a prompt that ends with a whole character).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self.push: Callable[[int], str]
        self.flush: Callable[..., str]  # (token_ids=()): the rest of the text, with these last tokens
        if tokenizer.is_byte_level():
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            self.push, self.flush = self._push_bytes, self._flush_bytes
        else:
            self._pending: list[int] = []
            self._context: list[int] = []  # at most one id: the last one whose text has been emitted
            self._context_text = ""
            self.push, self.flush = self._push_pieces, self._flush_pieces
            self._take_context(prompt_token_ids)

    def _counts(self, token_id: int) -> bool:
        """Whether decode would look at this token at all."""
        return token_id not in self._skip and self._tokenizer.id_to_token(token_id) is not None

    # Byte level: tokens are runs of bytes, and the only state is an unfinished UTF-8 character.

    def _push_bytes(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def _flush_bytes(self, token_ids: Sequence[int] = ()) -> str:
        skip, bytes_of = self._skip, self._tokenizer.token_bytes
        return self._utf8.decode(b"".join([bytes_of(i) for i in token_ids if i not in skip]), final=True)

    # SentencePiece style: a token's text depends on whether it comes first, and a run of byte tokens
    # (<0xE4>) is one unit: it decodes to characters if the whole run is valid UTF-8, else to one U+FFFD per
    # byte. So a piece is emitted when a token that is no byte follows, and is decoded behind one token of
    # context, which absorbs the special treatment of the first.

    def _take_context(self, ids: Sequence[int]) -> None:
        for token_id in reversed(ids):
            if self._counts(token_id) and not self._is_byte(token_id) and self._tokenizer.id_to_token(token_id):
                self._context = [token_id]
                self._context_text = self._decode(self._context)
                return

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)  # skipped ids never get this far

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _push_pieces(self, token_id: int) -> str:
        if not self._counts(token_id):
            return ""
        self._pending.append(token_id)
        return "" if self._is_byte(token_id) else self._flush_pieces()

    def _flush_pieces(self, token_ids: Sequence[int] = ()) -> str:
        pending, self._pending = self._pending, []
        pending += [token_id for token_id in token_ids if self._counts(token_id)]
        text = self._decode(self._context + pending)[len(self._context_text) :]
        self._take_context(pending)
        return text


def _special_token(fields: Fields, key: str) -> str | None:
    """A special token's text; files give it as a string or as an object with `content`."""
    value = fields.data.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise fields.error(key, "a string or an object with the string `content`")
    return value


def _chat_templates(fields: Fields) -> dict[str, str]:
    """chat_template is one Jinja text, or a list of {name, template}."""
    given = fields.data.get("chat_template")
    entries = [{"name": "default", "template": given}] if isinstance(given, str) else given or []
    templates: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise fields.error("chat_template", "a string or a list of {name, template}")
        if len(template) > MAX_TEMPLATE_BYTES:
            raise ModelLoadError(
                f"{fields.where}: chat_template {name!r} has {len(template)} characters, "
                f"at most {MAX_TEMPLATE_BYTES} are allowed"
            )
        templates[name] = template
    return templates


def _decoder_spec(backend: tokenizers.Tokenizer, where: str) -> str:
    """'bytes' for a byte-level decoder, 'pieces' for those whose tokens decode one by one behind a context.

    The incremental decoder is exact only for decoders it knows to be local; others are refused, not guessed
    at.
    """
    if backend.decoder is None:
        return "pieces"  # tokens joined by spaces
    spec = json.loads(backend.decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "bytes"
    fuse = names.index("Fuse") if "Fuse" in names else len(names)
    per_token = all(name in ("Replace", "ByteFallback", "Metaspace", "Strip") for name in names[:fuse])
    # After Fuse the text is one piece: only dropping one leading character of it stays local.
    whole = all(step["type"] == "Strip" and step["start"] <= 1 and not step["stop"] for step in steps[fuse + 1 :])
    if per_token and whole:
        return "pieces"
    raise ModelLoadError(
        f"{where}: {TOKENIZER_FILE} has the decoder {' + '.join(names)}; known are ByteLevel, Metaspace, and "
        "Replace/ByteFallback/Metaspace/Strip, then Fuse, then Strip of one leading character"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for: printable Latin-1 characters stand for
    themselves, the other 68 bytes are, in order, the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()
