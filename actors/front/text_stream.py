"""From tokens to text, piece by piece: UTF-8 across token borders, stop strings, and the chain of thought.

Three small machines, each fed in order and flushed once. How the input is cut into pieces never changes the
concatenation of what comes out; tests hold that for random cuts.

    token ids --Detokenizer--> text --StopMatcher--> text before the stop --ReasoningSplitter--> reasoning, content
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...model.chat_template import THINK_CLOSE, THINK_OPEN
from ...model.tokenizer import Tokenizer


class Detokenizer:
    """Text of a growing list of tokens. Special tokens stand for none; a character waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that became complete with this token; may be empty."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD for a character whose last bytes never came, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Ends text before the first stop string: the one whose last character comes first, the longest of those.

    Text that could be the beginning of a stop string is held back until it is known not to be.

    Attributes:
        stopped: a stop string was found; everything from its first character on is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that is now known to lie before any stop string."""
        if self.stopped:
            return ""
        if not self._searches:
            return text
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = [len(search.word) for search in self._searches if search.advance(character)]
            if found:
                self.stopped = True
                self._held = ""
                return buffer[: end - max(found)]
        certain = len(buffer) - max(search.matched for search in self._searches)
        self._held = buffer[certain:]
        return buffer[:certain]

    def flush(self) -> str:
        """What was held back and turned out to be text after all."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Knuth, Morris and Pratt's search for one word in text that comes character by character.

    Attributes:
        word: what is searched for, not empty.
        matched: how many characters of the word the text so far ends with.
    """

    def __init__(self, word: str) -> None:
        assert word, "an empty word is everywhere"
        self.word = word
        self.matched = 0
        # At n: how much of the word's beginning its first n + 1 characters end with, themselves not counted.
        self._shorter = [0]
        for character in word[1:]:
            self._shorter.append(self._extend(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Take the next character; whether it completes the word, after which the search is over."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.word)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.word[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.word[matched] == character)


@dataclass(frozen=True, slots=True)
class SplitText:
    """A piece of an answer, the thought apart from what is said."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """Takes R1's chain of thought out of the answer.

    The thought is what stands before `</think>`, if the prompt already opened it or the answer begins with `<think>`;
    any other answer is content as it is. Newlines at the ends of the thought and before the content are layout of the
    template, not part of either, and are dropped. A later `</think>` is content.

    Args:
        opened: the prompt ends in an open `<think>`.

    Attributes:
        thought_end: how many characters were fed up to the end of the first `</think>`; None while there was none.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._state: Literal["undecided", "before thought", "thought", "before content", "content"] = "undecided"
        self._fed = 0
        self._held = ""
        self.thought_end: int | None = None

    @property
    def has_thought(self) -> bool:
        """Whether the answer has a thought, as far as is known."""
        return self._opened if self._state == "undecided" else self._state != "content" or self.thought_end is not None

    def feed(self, text: str) -> SplitText:
        """What is now known to be thought, and to be content."""
        self._fed += len(text)
        self._held += text
        reasoning = content = ""
        if self._state == "undecided":
            self._decide()
        if self._state == "before thought":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "thought"
        if self._state == "thought":
            reasoning = self._take_thought()
        if self._state == "before content":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if self._state == "content":
            content, self._held = self._held, ""
        return SplitText(reasoning, content)

    def flush(self) -> SplitText:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        if self._state == "undecided" and not self._opened:
            return SplitText(content=held)
        if self._state == "undecided":
            return SplitText(reasoning=held.strip("\n"))
        return SplitText(reasoning=held.rstrip("\n"))

    def _decide(self) -> None:
        """Find out whether the answer has a thought: takes its first characters that are not whitespace."""
        first = self._held.lstrip()
        if first.startswith(THINK_OPEN):
            self._held = first[len(THINK_OPEN) :]
            self._state = "before thought"
        elif not THINK_OPEN.startswith(first):
            self._state = "before thought" if self._opened else "content"

    def _take_thought(self) -> str:
        """Remove from the held text what is thought for certain: all but newlines and the beginning of an end."""
        end = self._held.find(THINK_CLOSE)
        if end >= 0:
            thought, self._held = self._held[:end].rstrip("\n"), self._held[end + len(THINK_CLOSE) :]
            self.thought_end = self._fed - len(self._held)
            self._state = "before content"
            return thought
        keep = _longest_suffix_in(self._held, _CLOSE_PREFIXES, len(THINK_CLOSE) - 1)
        thought = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(thought) :]
        return thought


_CLOSE_PREFIXES = frozenset(THINK_CLOSE[:end] for end in range(1, len(THINK_CLOSE)))


def _longest_suffix_in(text: str, strings: frozenset[str], longest: int) -> int:
    """Length of the longest suffix of `text` that is one of `strings`, none of which is longer than `longest`."""
    for length in range(min(longest, len(text)), 0, -1):
        if text[len(text) - length :] in strings:
            return length
    return 0
