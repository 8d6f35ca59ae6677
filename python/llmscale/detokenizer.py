"""Ids to text, one stream at a time.

`Detokenizer` gives the text that an id makes certain in O(1) per id, also when a character's bytes are split over
several ids, and in bounded time for bytes that never become a character. It does not know where the ids come from or
who reads the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import tokenizers
from tokenizers.decoders import DecodeStream

# A character has at most 4 bytes, so 4 byte tokens complete it; text that is still open after 8 tokens is not UTF-8.
_MAX_OPEN_TOKENS: Final = 8
# All but the last byte of a character, so many tokens at most.
_MAX_OPEN_BYTES: Final = 3
# Further back nobody looks for text behind special tokens.
_MAX_CONTEXT_TOKENS: Final = 64
_REPLACEMENT: Final = "\ufffd"


class Detokenizer:
    """The text of one stream of ids, piece by piece; characters whose bytes are split over tokens come out whole.

    `context` are the ids that the stream goes on after; of these only the last few are looked at. A decoder of
    SentencePiece's kind drops the space before the first word of a text, so it must know that this is not the first.
    """

    __slots__ = ("_context", "_open", "_skip", "_stream", "_tokenizer")

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = self._whole_tail(context) if context else []
        # None while bytes that are not UTF-8 pass through: the library would hold them back, and then repeat them.
        self._stream: DecodeStream | None = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that is now certain, often one piece, sometimes nothing."""
        if self._stream is None:
            return self._push_textless(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as error:
            # The library raises a bare Exception when bytes that are not UTF-8 change the text before them.
            if "nvalid prefix" not in str(error):
                raise
            self._stream = None
            self._open.append(token)
            return self._push_undecodable()
        if text is None:
            return self._push_textless(token)
        if self._open:
            # All of its bytes: a context that begins within a character would be repeated.
            self._context, self._open = [*self._open, token], []
        else:
            self._context = [token]
        return text

    def finish(self) -> str:
        """Ends the stream: bytes that never became a character are shown as replacement characters."""
        text, _ = self._open_text()
        self._open = []
        return text

    def _whole_tail(self, ids: Sequence[int]) -> list[int]:
        """The last ids whose text ends with a whole character: the library would repeat what stands before an open one.

        Bytes that fall back make no text unless they begin with the first byte of a character, so four begins are
        tried; ends are tried from the last id to the one before an open character.
        """
        shown: list[int] = []
        for token in reversed(ids[-_MAX_CONTEXT_TOKENS:]):
            if not self._adds_nothing(token):
                shown.append(token)
                if len(shown) == _MAX_OPEN_TOKENS + _MAX_OPEN_BYTES:
                    break
        shown.reverse()
        for end in range(len(shown), max(0, len(shown) - _MAX_OPEN_BYTES - 1), -1):
            for begin in range(end - _MAX_OPEN_TOKENS, end - _MAX_OPEN_TOKENS + _MAX_OPEN_BYTES + 1):
                tail = shown[max(0, begin) : end]
                if not self._decode(tail).endswith(_REPLACEMENT):
                    return tail
        return []

    def _push_textless(self, token: int) -> str:
        if self._adds_nothing(token):
            if self._stream is not None:
                # The library would keep it, and decode it again with every token: a stream without it.
                self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
                for open_token in self._open:
                    self._stream.step(self._tokenizer, open_token)
            return ""
        self._open.append(token)
        if self._stream is not None:
            if len(self._open) < _MAX_OPEN_TOKENS:
                return ""
            # Bytes that never become a character would be decoded again with every token, in quadratic time.
            self._stream = None
        return self._push_undecodable()

    def _adds_nothing(self, token: int) -> bool:
        """Whether it is an unknown id, or a special token that is not shown. A space that the decoder strips is
        neither."""
        if self._decode([token]):
            return False
        if self._tokenizer.id_to_token(token) is None:
            return True
        return self._skip and self._tokenizer.decode([token], skip_special_tokens=False) != ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _push_undecodable(self) -> str:
        text, broken = self._open_text()
        if broken and len(self._open) < _MAX_OPEN_TOKENS:
            return ""
        self._context, self._open = [*self._context, *self._open][-_MAX_OPEN_TOKENS:], []
        if not broken:
            self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
        return text

    def _open_text(self) -> tuple[str, bool]:
        """What the ids that were held back add to the text, and whether its last character may still be open."""
        if not self._open:
            return "", False
        before = self._decode(self._context)
        text = self._decode([*self._context, *self._open])
        if text.startswith(before):
            # A byte may add nothing and still leave a character open: it goes on with bytes that were shown as one
            # replacement already. A stream that began anew there would repeat what it was given as context.
            return text[len(before) :], text.endswith(_REPLACEMENT)
        # Byte fallback: one bad byte turns the good ones before it, which were shown already, into replacements too.
        alone = self._decode(self._open)
        return alone, alone.endswith(_REPLACEMENT)
