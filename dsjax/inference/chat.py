"""Conversations with the model."""

import dataclasses
from collections.abc import Iterator

from dsjax.data.chat import Message, Template, conversation_tokens
from dsjax.inference.engine import Engine
from dsjax.inference.sampling import Sampling

PLAIN_STOP = "\nuser:"


def with_stop(sampling: Sampling, template: Template | None) -> Sampling:
    """`sampling` with what ends an answer: in a plain transcript also the user's next turn."""
    return sampling if template else dataclasses.replace(sampling, stop=(*sampling.stop, PLAIN_STOP))


class Conversation:
    """Turns between a user and the model."""

    def __init__(self, engine: Engine, sampling: Sampling, template: Template | None, system: str | None = None):
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._engine, self._template = engine, template
        self._sampling = with_stop(sampling, template)

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to the next turn, in pieces; it is part of the conversation once it is complete.

        A plain transcript puts a space before what a turn says, and the model writes that; the answer is without it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        assert self._engine.tokenizer is not None
        tokens = conversation_tokens(self._engine.tokenizer, asked, self._template)
        pieces: list[str] = []
        for piece in self._engine.stream(tokens, self._sampling):
            if not pieces and self._template is None:
                piece = piece.removeprefix(" ")
            pieces.append(piece)
            if piece:
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
