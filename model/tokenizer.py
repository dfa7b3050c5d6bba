"""The checkpoint's tokenizer: text to token ids and back, and chat messages to a prompt.

Every model of the family has a byte-level BPE: each token stands for a fixed string of bytes, so an answer's text is
its tokens' bytes decoded as UTF-8, whatever way it is cut into pieces. Tokenizers of another kind are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..configs.errors import CheckpointError, RequestError
from .chat_template import THINK_OPEN, AddedToken, ChatMessage, ChatTemplate, Segment

__all__ = ["ChatMessage", "ChatPrompt", "Tokenizer"]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation.

    Attributes:
        text: the prompt as the template wrote it.
        token_ids: the same as token ids; text from messages never became an added token (see `chat_template`).
        opens_reasoning: the prompt ends inside a `<think>` block, so that the answer starts with a thought.
    """

    text: str
    token_ids: list[int]
    opens_reasoning: bool


class Tokenizer:
    """A byte-level BPE with DeepSeek's added tokens. Safe to use from several threads; see `load`.

    Attributes:
        vocab_size: largest token id + 1 (a model's own vocabulary is often padded to more).
        bos_token_id: put before plain text when the checkpoint says so (`add_bos_token`), else only by its template.
        eos_token_id: the token that ends an answer, if the tokenizer's configuration names one.
        special_ids: tokens that steer the model and never appear in text, as the end-of-sentence token.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, config: dict[str, Any], template: str | None, origin: Path
    ) -> None:
        self._origin = origin
        _refuse_other_kinds(library, origin)
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._plain = _without_added_tokens(library)
        added = library.get_added_tokens_decoder()
        self._ids_of_added = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._bytes = [b""] * self.vocab_size
        for token, token_id in vocabulary.items():
            self._bytes[token_id] = token.encode() if token_id in added else _bytes_of(token)
        special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
        self.bos_token_id = self._id_of(special, "bos_token")
        self.eos_token_id = self._id_of(special, "eos_token")
        # DeepSeek's files say it in the configuration; others only through a post-processor.
        by_processor = library.encode("", add_special_tokens=True).ids[:1] == [self.bos_token_id]
        self._adds_bos = bool(config.get("add_bos_token", by_processor))
        self._template = None
        if template is not None:
            self._template = ChatTemplate(
                template,
                variables=special,
                added_tokens=[AddedToken(token.content, token.lstrip, token.rstrip) for token in added.values()],
                origin=str(origin),
            )

    @classmethod
    def load(cls, checkpoint: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja`.

        Raises:
            CheckpointError: a file is missing or damaged, or the tokenizer is not a byte-level BPE.
        """
        path = checkpoint / "tokenizer.json"
        text = _read(path)
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            # The library raises bare `Exception` for every kind of damage.
            raise CheckpointError(f"{path}: not a tokenizer ({error}); download the file again") from error
        config_path = checkpoint / "tokenizer_config.json"
        try:
            config = json.loads(_read(config_path))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{config_path}: cannot be read as JSON ({error}); download the file again"
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{config_path}: holds {type(config).__name__}, not an object; download the file again"
            )
        template_path = checkpoint / "chat_template.jinja"
        if template_path.exists():
            return cls(library, config, _read(template_path), checkpoint)
        return cls(library, config, _template_in(config, config_path), checkpoint)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint can render conversations."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of raw text. Added tokens spelt out in it are recognized: for messages use `apply_chat_template`.

        Args:
            text: what to tokenize; may be empty.
            add_special_tokens: begin with the begin-of-sentence token if the checkpoint asks for it, never twice.
        """
        (ids,) = _encode(self._library, [text])
        if add_special_tokens and self._adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. Ids the tokenizer lacks stand for no text."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped).decode(
            errors="replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; a special token's name as UTF-8; none for an id of the model's padding."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def apply_chat_template(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> ChatPrompt:
        """Render a conversation with the checkpoint's template.

        Raises:
            RequestError: there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise RequestError(
                f"the model in {self._origin.name} has no chat template; send a prompt to /v1/completions instead",
                param="messages",
            )
        segments = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        texts = iter(_encode(self._plain, [segment.text for segment in segments if not segment.is_added_token]))
        ids: list[int] = []
        for segment in segments:
            if segment.is_added_token:
                token_id = self._ids_of_added.get(segment.text)
                ids.append(self._ids_of_added[segment.text.strip()] if token_id is None else token_id)
            else:
                ids.extend(next(texts))
        return ChatPrompt(
            text="".join(segment.text for segment in segments),
            token_ids=ids,
            opens_reasoning=self._opens_reasoning(segments),
        )

    def _opens_reasoning(self, segments: Sequence[Segment]) -> bool:
        """Whether the prompt's last word is the template's own `<think>`, not one that a message ends with."""
        last = next((segment for segment in reversed(segments) if segment.text.strip()), None)
        if last is None or not last.text.rstrip().endswith(THINK_OPEN):
            return False
        return last.is_added_token or THINK_OPEN not in self._ids_of_added

    def _id_of(self, special: dict[str, str], name: str) -> int | None:
        if name not in special:
            return None
        token_id = self._library.token_to_id(special[name])
        if token_id is None:
            raise CheckpointError(
                f"{self._origin / 'tokenizer_config.json'}: {name} = {special[name]!r} is not in tokenizer.json; "
                "the two files are from different checkpoints, download both again"
            )
        return int(token_id)


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; the model must be a directory with tokenizer.json and tokenizer_config.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); download the file again") from error


def _template_in(config: dict[str, Any], path: Path) -> str | None:
    """The template in `tokenizer_config.json`: one string, or a list of named ones of which `default` is taken."""
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {entry["name"]: entry.get("template") for entry in value if isinstance(entry, dict) and "name" in entry}
        default = named.get("default")
        if isinstance(default, str):
            return default
        raise CheckpointError(
            f"{path}: chat_template has the names {sorted(map(str, named))} but no text under 'default'; add one, "
            "or put the template to use in chat_template.jinja"
        )
    raise CheckpointError(
        f"{path}: chat_template is {type(value).__name__}; must be a string or a list of named templates"
    )


def _encode(library: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. In batches, because those let other threads run: the front has streams to feed."""
    return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as the dictionary of an `AddedToken`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _refuse_other_kinds(library: tokenizers.Tokenizer, origin: Path) -> None:
    description = json.loads(library.to_str())
    decoder = description.get("decoder") or {}
    kinds = {decoder.get("type")} | {step.get("type") for step in decoder.get("decoders", ())}
    if description["model"].get("type") != "BPE" or "ByteLevel" not in kinds:
        raise CheckpointError(
            f"{origin / 'tokenizer.json'}: model {description['model'].get('type')!r} with decoder "
            f"{decoder.get('type')!r} is not supported; the byte-level BPE of DeepSeek's checkpoints is"
        )


def _without_added_tokens(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that cannot produce an added token from any text."""
    description = json.loads(library.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next free character from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """Bytes of a BPE token; one spelt outside the byte alphabet is a name, and stands for its own UTF-8."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()
