"""Learning a tokenizer from the text of a config."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from dsjax.__main__ import main
from dsjax.config import ConfigError, DataConfig
from dsjax.data import packing, prepare, tokenizer, vocabulary
from dsjax.training.resume import keep_tokenizer
from dsjax.training.workdir import find_tokenizer

TEXTS = [f"document {i}: def function_{i % 7}(argument): return argument + {i}  # wörld 你好\n" * 3 for i in range(300)]


@pytest.fixture
def data(tmp_path):
    """data(**options) -> the options of a source of TEXTS and a new tokenizer."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {
        "sources": (f"text_files:{texts}",),
        "tokenizer": str(tmp_path / "new" / "tokenizer.json"),
        "directory": str(tmp_path / "data"),
        "sequence_length": 32,
        "validation_fraction": 0.2,
    }
    return lambda **changed: DataConfig(**{**options, **changed})


def test_what_is_learnt_loads_packs_and_gives_every_text_back(data):
    told = vocabulary.learn(data(), 400, progress=False)
    assert told.startswith(f"{data().tokenizer}: 400 tokens, documents: ")
    learnt = tokenizer.load(data().tokenizer)
    assert learnt.vocab_size == 400 and learnt.fim_ids is not None
    for text in [*TEXTS, "", "\x00\x7f\U0010ffff 🎉", "a" * 500]:
        assert learnt.decode(learnt.encode(text)) == text
    assert len(learnt.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 3
    (prepared,) = prepare.prepare(data(), progress=False)
    assert prepared.manifest["vocab_size"] == 400


def test_the_same_text_gives_the_same_file(data, tmp_path):
    digests = set()
    for name in ("one.json", "two.json"):
        path = tmp_path / name
        vocabulary.learn(data(tokenizer=str(path)), 500, progress=False)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_documents_held_out_are_not_read(data, tmp_path):
    """What is learnt is what would be learnt if they did not exist."""
    kept = [text for text in TEXTS if packing.draws(text.encode())[0] >= 0.2]
    assert 0 < len(kept) < len(TEXTS)
    told = vocabulary.learn(data(), 500, progress=False)
    assert f"documents: {len(kept)}, bytes: {sum(len(text.encode()) for text in kept):,}" in told
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    alone = data(sources=(f"text_files:{tmp_path}/kept.jsonl",), tokenizer=f"{tmp_path}/alone.json")
    vocabulary.learn(alone, 500, progress=False)
    assert Path(alone.tokenizer).read_bytes() == Path(data().tokenizer).read_bytes()


def test_a_text_with_few_pairs_gives_fewer_tokens_and_says_so(data):
    assert ": 4,096 tokens, " not in (told := vocabulary.learn(data(), 4096, progress=False))
    size = tokenizer.load(data().tokenizer).vocab_size
    assert f": {size:,} tokens and no more pairs to merge for 4,096, documents: " in told and 260 < size < 4096


def test_what_cannot_be_read_is_skipped_and_told(data, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "good.txt").write_text("good text " * 100)
    both = data(sources=(f"text_files:{tmp_path}/*.txt",), validation_fraction=0.0)
    told = vocabulary.learn(both, 400, progress=False)
    assert "documents: 1, bytes: 1,000\n" in told and told.endswith(f"  skipped 1 not UTF-8: {tmp_path}/bad.txt")
    alone = data(sources=(f"text_files:{tmp_path}/bad.txt",), tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no text to learn from, skipped 1 not UTF-8: .*bad.txt; look at"):
        vocabulary.learn(alone, 400, progress=False)


@pytest.mark.parametrize(
    ("changed", "vocab_size", "told"),
    [
        ({"tokenizer": "bytes"}, 400, "data.tokenizer is 'bytes', but must say where the new tokenizer goes"),
        ({"tokenizer": "tiktoken.model"}, 400, "must say where the new tokenizer goes"),
        ({"sources": ("chat:nowhere.jsonl",)}, 400, "learnt from texts, not from conversations"),
        ({"sources": ("text_files:nowhere",)}, 400, "nowhere"),
        ({"validation_fraction": 0.999999}, 400, "no text to learn from"),
        ({}, 259, "model.vocab_size is 259, but a tokenizer has 260 .bytes and special tokens. to 1,048,576 tokens"),
        ({}, 10**9, "model.vocab_size is 1000000000, but a tokenizer has"),
    ],
)
def test_what_cannot_be_learnt_is_told_and_nothing_is_written(data, changed, vocab_size, told):
    with pytest.raises(ConfigError, match=told):
        vocabulary.learn(data(**changed), vocab_size, progress=False)
    assert not Path(data().tokenizer).exists()


def test_a_tokenizer_that_is_there_is_not_written_over(data):
    vocabulary.learn(data(), 400, progress=False)
    before = Path(data().tokenizer).read_bytes()
    with pytest.raises(ConfigError, match="exists; delete it, or name another file"):
        vocabulary.learn(data(), 500, progress=False)
    assert Path(data().tokenizer).read_bytes() == before


def test_a_file_where_a_folder_should_be_is_told(data, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written .File exists."):
        vocabulary.learn(data(tokenizer=f"{tmp_path}/texts.jsonl/new.json"), 400, progress=False)


def test_a_full_disk_is_told_and_leaves_nothing(data, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written .No space left on device."):
        vocabulary.learn(data(), 400, progress=False)
    assert os.listdir(Path(data().tokenizer).parent) == []


def test_an_interrupt_ends_it_and_leaves_nothing(data, monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(vocabulary, "draws", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vocabulary.learn(data(), 400, progress=False)
    assert not Path(data().tokenizer).exists()


def test_a_run_keeps_it_whatever_its_name(data, tmp_path):
    name = str(tmp_path / "mine.json")
    vocabulary.learn(data(tokenizer=name), 400, progress=False)
    learnt = tokenizer.load(name)
    assert find_tokenizer(tmp_path, name) == name
    keep_tokenizer(tmp_path, name)
    assert tokenizer.load(find_tokenizer(tmp_path, name)).fingerprint == learnt.fingerprint
    Path(name).unlink()
    assert tokenizer.load(find_tokenizer(tmp_path, name)).fingerprint == learnt.fingerprint
    assert find_tokenizer(tmp_path, "bytes") == "bytes"


def test_another_file_of_that_name_is_not_the_runs_tokenizer(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        monkeypatch.chdir(folder)
        tokenizer.ByteTokenizer().write(folder)
    keep_tokenizer(run, "tokenizer.json")
    content = Path("tokenizer.json").read_text()
    Path("tokenizer.json").write_text(content.replace("}", "} ", 1))
    assert find_tokenizer(run, "tokenizer.json") == str(run / "tokenizer" / "tokenizer.json")
    keep_tokenizer(run, "tokenizer.json", step=1)
    assert (run / "tokenizer" / "tokenizer.json").read_text() == content
    keep_tokenizer(run, "tokenizer.json")
    assert (run / "tokenizer" / "tokenizer.json").read_text() != content, "a run of no step may begin with another"


def test_the_copy_is_whole_or_not_there(tmp_path, monkeypatch):
    tokenizer.ByteTokenizer().write(tmp_path)
    name, run = str(tmp_path / "tokenizer.json"), tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)  # as a kill left it in earlier versions
    write = tokenizer.JsonTokenizer.write

    def half(self, directory):
        write(self, directory)
        (directory / "tokenizer_config.json").unlink()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer.JsonTokenizer, "write", half)
    with pytest.raises(ConfigError, match="tokenizer.json' cannot be copied to .*No space left on device"):
        keep_tokenizer(run, name, step=1)
    assert find_tokenizer(run, name) == name
    (run / ".tokenizer.tmp" / "rubbish").write_text("")
    monkeypatch.setattr(tokenizer.JsonTokenizer, "write", write)
    keep_tokenizer(run, name, step=1)
    assert os.listdir(run) == ["tokenizer"]
    assert sorted(os.listdir(run / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_copy_has_no_settings_that_the_original_has_not(tmp_path):
    """With a made up eos_token a chat template would be rendered otherwise than in training."""
    tokenizer.ByteTokenizer().write(tmp_path)
    (tmp_path / tokenizer.CONFIG).unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    (tmp_path / "run").mkdir()
    keep_tokenizer(tmp_path / "run", str(tmp_path / "tokenizer.json"))
    assert sorted(os.listdir(tmp_path / "run" / "tokenizer")) == ["chat_template.jinja", "tokenizer.json"]


def test_the_command_takes_both_from_the_config(repository, data, tmp_path, capsys):
    out = tmp_path / "from_config.json"
    code = main(
        [
            "tokenizer",
            f"--config={repository / 'configs' / 'tiny.py'}",
            f"--config.data.sources={data().sources[0]}",
            f"--config.data.tokenizer={out}",
            "--config.model.vocab_size=300",
        ]
    )
    assert code == 0 and capsys.readouterr().out.startswith(f"{out}: 300 tokens, documents: ")
    assert tokenizer.load(str(out)).vocab_size == 300
