"""Text out of a stream of tokens, and the stop strings in it."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that are no character yet.
UNFINISHED = "\ufffd"
# Tokens before an answer that its first ones are decoded after; special ones among them say nothing.
CONTEXT = 8


class TextStream:
    """Turns the tokens of one answer into pieces of text, and ends at the first stop string.

    Nothing is given out that a later token could change: a character of several tokens waits for the last of them, and
    text that may be the beginning of a stop string waits until it is known.

    Args:
        tokenizer: of the model.
        stops: strings at which the text ends; they are left out of it.
        after: ids that the answer goes on from. Many tokenizers drop the space before the first word of what they
            decode, and here that space is part of the text.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), after: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stop for stop in stops if stop)
        self.ids = list(after[-CONTEXT:])
        self.text = ""
        self.stopped_by: str | None = None
        # Where decoding begins anew, a whole character before the last ones; and what of that is in `_seen` already.
        self._from, self._until = 0, len(self.ids)
        if self._decode(0, self._until).endswith(UNFINISHED):
            # The answer's first bytes may complete a character of the prompt, so they are decoded by themselves.
            self._from = self._until
        self._seen = ""

    def put(self, token_id: int) -> str:
        """Take a token; returns the text that is now certain, often nothing."""
        if self.stopped_by is not None:
            return ""
        self.ids.append(token_id)
        before = self._decode(self._from, self._until)
        now = self._decode(self._from, len(self.ids))
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._seen += now[len(before) :]
        self._from, self._until = self._until, len(self.ids)
        return self._give(self._certain())

    def end(self) -> str:
        """No more tokens come; returns the text that was held back."""
        if self.stopped_by is not None:
            return ""
        self._seen += self._decode(self._from, len(self.ids))[len(self._decode(self._from, self._until)) :]
        certain = self._certain()
        return self._give(len(self._seen) if self.stopped_by is None else certain)

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)

    def _certain(self) -> int:
        """How much of what was seen can be given out; notes the stop string that is complete first."""
        places = {stop: self._seen.find(stop, len(self.text)) for stop in self.stops}
        found = [(place + len(stop), place, stop) for stop, place in places.items() if place >= 0]
        if found:
            _, place, self.stopped_by = min(found)
            return place
        held = 0
        for stop in self.stops:
            longest = min(len(stop) - 1, len(self._seen) - len(self.text))
            held = max([held, *(n for n in range(1, longest + 1) if self._seen.endswith(stop[:n]))])
        return len(self._seen) - held

    def _give(self, end: int) -> str:
        piece = self._seen[len(self.text) : end]
        self.text += piece
        return piece
