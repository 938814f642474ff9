"""Conversations as tokens: the model's own chat template, or a plain transcript.

The template's text may name special tokens; what users and systems say may not: their words are encoded as plain text
wherever the template puts them, so that nobody ends a turn by writing the token that does.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config import ConfigError
from dsjax.data.tokenizer import CONFIG, TEMPLATE_FILE, Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
THINK = "<think>"


class Refusal(ConfigError):
    """A template cannot render one conversation; it may well render another."""


@dataclass(frozen=True)
class Template:
    """A Jinja template as transformers takes it, and the special tokens that it may name."""

    source: str
    names: dict[str, str]  # bos_token, eos_token
    now: datetime.datetime | None = None  # the time that it may tell; None: that of rendering

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt up to where the assistant begins. Raises Refusal where the template refuses."""
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise ConfigError("the model's chat template needs jinja2: pip install 'dsjax[chat]'") from error
        now = self.now or datetime.datetime.now()
        try:
            return _compiled(self.source).render(
                messages=list(messages), add_generation_prompt=True, strftime_now=now.strftime, **self.names
            )
        # Beside its own errors, Jinja lets through those of the expressions in a template.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise Refusal(f"the model's chat template cannot render this conversation: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A Jinja template, compiled once for all conversations. Raises jinja2.TemplateError for one that is none."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def find_template(tokenizer: str) -> Template | None:
    """The template beside a tokenizer's file: chat_template.jinja, or one in tokenizer_config.json; or None."""
    folder = Path(tokenizer).expanduser().parent
    if not Path(tokenizer).expanduser().is_file():
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    config = config if isinstance(config, dict) else {}
    names = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        names[name] = text if isinstance(text, str) else ""
    own = folder / TEMPLATE_FILE
    source: Any = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return Template(source, names) if isinstance(source, str) else None


def conversation_tokens(tokenizer: Tokenizer, messages: Sequence[Message], template: Template | None) -> list[int]:
    """The prompt of a conversation: everything said so far, and that the assistant is to speak."""
    return _prompt(tokenizer, messages, template)[0]


class Answered(NamedTuple):
    """A prompt's tokens, those of the answer to it with the end-of-document token, and the text these stand for."""

    prompt: list[int]
    answer: list[int]
    text: str


def answered(tokenizer: Tokenizer, messages: Sequence[Message], content: str, template: Template | None) -> Answered:
    """What the model would have to write to answer `messages` with `content`, and the prompt it would have before it.

    Some templates, R1's for one, begin the assistant's thoughts themselves: then content that begins them too does not
    begin them twice.
    """
    prompt, rendered = _prompt(tokenizer, messages, template)
    if template is None:
        return Answered(prompt, [*tokenizer.encode(f" {content}"), tokenizer.eos_id], content)
    for opening in (f"{THINK}\n", THINK):
        if rendered.endswith(opening):
            # Where only the prompt breaks the line, the thoughts begin right after the tag.
            content = content.removeprefix(opening if content.startswith(opening) else THINK)
            break
    return Answered(prompt, [*tokenizer.encode_template(content), tokenizer.eos_id], content)


def _prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: Template | None) -> tuple[list[int], str]:
    """A prompt's tokens, and its text with the words of others hidden behind marks."""
    if template is None:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
        return tokenizer.encode(text), text
    # Words of others stand in by marks, which nobody can know, while the template is rendered.
    marks = {f"<{secrets.token_hex(8)}>": m["content"] for m in messages if m["role"] != "assistant"}
    names = iter(marks)
    hidden = [m if m["role"] == "assistant" else {**m, "content": next(names)} for m in messages]
    rendered = template.render(hidden)
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", rendered) if marks else [rendered]
    tokens: list[int] = []
    for piece in pieces:
        tokens += tokenizer.encode(marks[piece]) if piece in marks else tokenizer.encode_template(piece)
    return tokens, rendered


def answers(messages: Sequence[Message]) -> Iterator[tuple[Sequence[Message], str]]:
    """Every turn of the assistant: what was said before it, and its content."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:number], message["content"]


def messages_of(record: object) -> list[Message]:
    """The conversation in a line of a file: {"messages": [{"role": ..., "content": ...}, ...]}, or a prompt and its
    "response" or "completion", which are a turn each.

    Raises ValueError with the reason where there is none that a model could learn from.
    """
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    turns = record.get("messages")
    if "messages" not in record:
        said = [record.get("prompt"), record.get("response", record.get("completion"))]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        if not all(isinstance(text, str) for text in said):
            raise ValueError('neither "messages" nor a text "prompt" with a text "response" or "completion"')
    if not isinstance(turns, list) or not turns:
        raise ValueError("no messages")
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a message that is no object")
    messages = [{name: turn.get(name) for name in ("role", "content")} for turn in turns]
    if not all(isinstance(value, str) for message in messages for value in message.values()):
        raise ValueError("a message without a text as role and content")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant")
    if not all(content.strip() for _, content in answers(messages)):
        raise ValueError("an empty turn of the assistant")
    return messages
