"""Documents: what is read, in which order, and what is survived."""

import gzip
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dsjax.config import ConfigError
from dsjax.data import sources
from dsjax.data.sources import Skipped


def read(name, text_key="text"):
    """All documents of a source, and what was skipped."""
    skipped = Skipped()
    source = sources.find(name, text_key)
    documents = list(source.read(skipped))
    done = [document.done for document in documents]
    assert done == sorted(done) and (not done or done[-1] <= source.size)
    return documents, skipped


def test_stdlib_is_code_without_tests():
    documents, skipped = read("python_stdlib")
    names = {document.name for document in documents}
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
    assert 5e6 < sum(len(document.text) for document in documents) < 50e6
    assert [document.name for document in documents] == [document.name for document in read("python_stdlib")[0]]


def test_folder_reads_every_kind_and_leaves_out_the_rest(tmp_path):
    import pyarrow.parquet

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("\ufeffplain é\r\n", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "other": 1}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", "five"], "n": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "e.md").write_text("# six")
    (tmp_path / "f.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "g.txt").write_text("secret")
    documents, skipped = read(f"text_files:{tmp_path}")
    assert [document.text for document in documents] == ["one", "two", "three", "four", "five", "plain é\r\n", "# six"]
    assert not skipped.reasons


def test_glob_and_single_file_read_other_suffixes_as_text(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.txt").write_text("y")
    assert [document.text for document in read(f"text_files:{tmp_path}/*.py")[0]] == ["x = 1"]
    assert [document.text for document in read(f"text_files:{tmp_path}/a.py")[0]] == ["x = 1"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert [document.text for document in read(f"text_files:{tmp_path}/a[1].txt")[0]] == ["one"]


def test_deeply_nested_json_and_gzipped_parquet_are_survived(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"text": "good"}\n')
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    documents, skipped = read(f"text_files:{tmp_path}")
    assert [document.text for document in documents] == ["good"]
    assert dict(skipped.reasons) == {"not JSON": 1}


def test_unusable_text_is_skipped_named_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_text(" \n\t")
    lines = ['{"text": "good"}', "{broken", '{"title": "no text"}', '{"text": 5}', '{"text": ""}', "[1]"]
    (tmp_path / "d.jsonl").write_text("\n".join([*lines, '{"text": "\\ud800"}', '{"text": "last"}']))
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "after"}\n')
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000)[:-20])
    (tmp_path / "g.txt.gz").write_bytes(b"not gzip")
    documents, skipped = read(f"text_files:{tmp_path}")
    texts = [document.text for document in documents]
    assert texts[:3] == ["good", "last", "after"] and set(texts[3:]) <= {"x"}
    assert dict(skipped.reasons) == {
        "not UTF-8": 2,
        "empty": 3,
        "not JSON": 1,
        "no text in 'text'": 3,
        "not Unicode (a lone surrogate)": 1,
        "broken gzip": 2,
    }
    assert skipped.named["not JSON"] == [f"{tmp_path / 'd.jsonl'}:2"]
    assert skipped.named["broken gzip"] == [str(tmp_path / "f.jsonl.gz"), str(tmp_path / "g.txt.gz")]


def test_bad_parquet_is_skipped(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None]}), tmp_path / "c.parquet")
    documents, skipped = read(f"text_files:{tmp_path}")
    assert [document.text for document in documents] == ["fine"]
    assert set(skipped.reasons) == {"no column 'text'", "broken parquet", "no text in 'text'"}
    assert [document.text for document in read(f"text_files:{tmp_path}", "body")[0]] == ["x"]


def test_file_that_vanishes_is_survived(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    skipped = Skipped()
    documents = sources.find(f"text_files:{tmp_path}", "text").read(skipped)
    assert next(documents).text == "a"
    (tmp_path / "b.txt").unlink()
    assert [document.text for document in documents] == ["c"]
    assert skipped.named == {"vanished before it was read": [str(tmp_path / "b.txt")]}


def test_long_file_is_cut_at_line_ends_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    text = "".join(f"línea {i} 你好\n" for i in range(500)) + "é" * 5000
    (tmp_path / "a.txt").write_text(text)
    documents, _ = read(f"text_files:{tmp_path}")
    assert len(documents) > 5 and "".join(document.text for document in documents) == text
    assert documents[0].text.endswith("\n")
    assert len({document.name for document in documents}) == len(documents)


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no .txt"):
        sources.find(f"text_files:{tmp_path}", "text")
    for name in (f"text_files:{tmp_path}/none*.txt", "text_files:", "stdlib", "python_stdlib:x", "tfds:"):
        with pytest.raises(ConfigError):
            sources.find(name, "text")


def test_identity_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = sources.find(f"text_files:{tmp_path}", "text").identity
    assert sources.find(f"text_files:{tmp_path}", "text").identity == before
    (tmp_path / "b.txt").write_text("two")
    after = sources.find(f"text_files:{tmp_path}", "text").identity
    assert after != before
    (tmp_path / "b.txt").write_text("longer")
    assert sources.find(f"text_files:{tmp_path}", "text").identity not in (before, after)


class DsjaxTinyTexts(tfds.core.GeneratorBasedBuilder):
    """A dataset as somebody might host it."""

    VERSION = tfds.core.Version("1.0.0")
    texts = ["first", "", "third ü"]

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "n": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for n, text in enumerate(self.texts):
            yield n, {"body": text, "n": n}


def test_hosted_dataset_is_read_by_text_key(tmp_path):
    DsjaxTinyTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    documents, skipped = read("tfds:dsjax_tiny_texts", "body")
    assert [document.text for document in documents] == ["first", "third ü"]
    assert dict(skipped.reasons) == {"empty": 1}
    with pytest.raises(ConfigError, match="no field 'text'.*body"):
        sources.find("tfds:dsjax_tiny_texts", "text")


def test_hosted_dataset_without_network_fails_fast(monkeypatch, tmp_path):
    def no_network(request, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("tried"))
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        sources.find("tfds:tiny_shakespeare", "text")
    with pytest.raises(ConfigError, match="knows no dataset"):
        sources.find("tfds:no_such_dataset_anywhere", "text")


def test_many_skips_are_counted_but_not_all_named():
    skipped = Skipped()
    for number in range(1000):
        skipped.add(str(number), "empty")
    assert skipped.reasons["empty"] == 1000 and len(skipped.named["empty"]) == sources.NAMED_SKIPS


def test_records_keep_their_text_exactly(tmp_path):
    texts = ["a\r\nb", "\u2028line", "tab\t", "  spaces  "]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert [document.text for document in read(f"text_files:{tmp_path}")[0]] == texts
