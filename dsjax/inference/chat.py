"""Conversations as tokens: the model's own chat template, or a plain transcript.

The template's text may name special tokens; what users and systems say may not: their words are encoded as plain text
wherever the template puts them, so that nobody ends a turn by writing the token that does.
"""

import dataclasses
import datetime
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.engine import Engine
from dsjax.inference.sampling import Sampling

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
PLAIN_STOP = "\nuser:"


@dataclass(frozen=True)
class Template:
    """A Jinja template as transformers takes it, and the special tokens that it may name."""

    source: str
    names: dict[str, str]  # bos_token, eos_token

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant begins. Raises ConfigError where the template refuses."""
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ConfigError("the model's chat template needs jinja2: pip install 'dsjax[chat]'") from error

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.source).render(
                messages=list(messages), add_generation_prompt=True, **self.names
            )
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the model's chat template cannot render this conversation: {error}") from error


def find_template(tokenizer: str) -> Template | None:
    """The template beside a tokenizer's file: chat_template.jinja, or one in tokenizer_config.json; or None."""
    folder = Path(tokenizer).expanduser().parent
    if not Path(tokenizer).expanduser().is_file():
        return None
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    names = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        names[name] = text if isinstance(text, str) else ""
    own = folder / "chat_template.jinja"
    source: Any = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return Template(source, names) if isinstance(source, str) else None


def conversation_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template | None, sampling: Sampling
) -> tuple[list[int], Sampling]:
    """The prompt of a conversation, and `sampling` with what ends an answer."""
    if template is None:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        stops = (*sampling.stop, PLAIN_STOP)
        return tokenizer.encode("".join(lines) + "assistant:"), dataclasses.replace(sampling, stop=stops)
    # Words of others stand in by marks, which nobody can know, while the template is rendered.
    marks = {f"<{secrets.token_hex(8)}>": m["content"] for m in messages if m["role"] != "assistant"}
    names = iter(marks)
    hidden = [m if m["role"] == "assistant" else {**m, "content": next(names)} for m in messages]
    pieces = (
        re.split(f"({'|'.join(map(re.escape, marks))})", template.render(hidden))
        if marks
        else [template.render(hidden)]
    )
    tokens: list[int] = []
    for piece in pieces:
        tokens += tokenizer.encode(marks[piece]) if piece in marks else tokenizer.encode_template(piece)
    return tokens, sampling


class Conversation:
    """Turns between a user and the model."""

    def __init__(self, engine: Engine, sampling: Sampling, template: Template | None, system: str | None = None):
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._engine, self._sampling, self._template = engine, sampling, template

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to the next turn, in pieces; it is part of the conversation once it is complete."""
        asked = [*self.messages, {"role": "user", "content": text}]
        assert self._engine.tokenizer is not None
        tokens, sampling = conversation_tokens(self._engine.tokenizer, asked, self._template, self._sampling)
        pieces = []
        for piece in self._engine.stream(tokens, sampling):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
