"""Conversations as rows of samples: what is trained, what is packed where, and what is skipped."""

import dataclasses
import gzip
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from dsjax.config import ConfigError, DataConfig
from dsjax.data import prepare, samples, tokenizer
from dsjax.data.chat import Template, answered, conversation_tokens
from dsjax.data.loader import Loader
from dsjax.data.marks import ANSWER, BEGINS, begins, is_answer, marked, token_of

BYTES = tokenizer.ByteTokenizer()
BOS, USER, ASSISTANT, EOS = "<s>", "<|User|>", "<|Assistant|>", "</s>"
# As R1's: thoughts of earlier turns are dropped, and the next ones are begun.
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
PLAIN_NAMES = {"bos_token": BOS, "eos_token": EOS}


def talk(*turns, system=None):
    """{"messages": ...} of turns by user and assistant in alternation."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def write_tokenizer(folder, template=None):
    """The path of a byte-level tokenizer.json with special tokens, and the template beside it."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([BOS, USER, ASSISTANT, EOS])
    built.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN_NAMES))
    return str(folder / "tokenizer.json")


@pytest.fixture
def make(tmp_path):
    """make(lines, **options) -> (config, prepared) of a chat source of these records or raw lines."""

    def make(lines, **options):
        path = tmp_path / "talks.jsonl"
        content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        config = DataConfig(sources=(f"chat:{path}",), directory=str(tmp_path / "data"), sequence_length=64)
        config = dataclasses.replace(config, validation_fraction=0.0)
        config = dataclasses.replace(config, **options)
        return config, prepare.prepare(config, progress=False)[0]

    return make


def stored_rows(prepared, split="train"):
    records = tfds.builder_from_directory(prepared.directory).as_data_source(split=split)
    return np.stack([record["tokens"] for record in records])


def samples_of(rows, eos=BYTES.eos_id):
    """(prompt, answer) as lists of tokens for every sample within the rows, padding left out."""
    found = []
    for row in rows:
        inner = row[:-1]
        for part in np.split(inner, np.flatnonzero(begins(inner))[1:]):
            if part.tolist() == [eos | BEGINS]:
                continue
            tokens, trained = token_of(part), is_answer(part)
            first = int(np.argmax(trained))
            assert trained.any() and not trained[:first].any() and trained[first:].all()
            found.append((tokens[:first].tolist(), tokens[first:].tolist()))
    return found


def texts_of(rows):
    """The same as texts, of bytes."""
    return [(BYTES.decode(prompt), BYTES.decode(answer)) for prompt, answer in samples_of(rows)]


def test_answers_and_their_end_are_trained_and_nothing_else(make):
    _, prepared = make([talk("hi?", "hö!", system="be kind"), {"prompt": "2+2", "response": "4"}], sequence_length=96)
    [row] = stored_rows(prepared)
    prompts = "system: be kind\nuser: hi?\nassistant:", "user: 2+2\nassistant:"
    answers = " hö!", " 4"
    assert texts_of([row]) == list(zip(prompts, answers, strict=True))
    assert [answer[-1] for _, answer in samples_of([row])] == [BYTES.eos_id] * 2
    expected, at = np.zeros(97, bool), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        size = len(answer.encode()) + 1
        expected[at + len(prompt) : at + len(prompt) + size] = True
        at += len(prompt) + size
    np.testing.assert_array_equal(is_answer(row), expected)
    assert row.dtype == np.int32
    counts = prepared.manifest["splits"]["train"]
    own = {"answers": expected.sum(), "samples": 2, "padding": 96 - at, "documents": 2, "rows": 1, "tokens": 97}
    assert counts == own | {"bytes": len("hö!".encode()) + 1}
    told = prepare.summary(prepared)
    assert f"2 documents, 2 samples, {expected.sum()} tokens of answers, {at / 96:.1%} full" in told


def test_every_turn_of_the_assistant_is_a_sample_after_all_that_was_said(make):
    _, prepared = make([talk("a", "b", "c", "d", "not answered")], sequence_length=128)
    assert texts_of(stored_rows(prepared)) == [
        ("user: a\nassistant:", " b"),
        ("user: a\nassistant: b\nuser: c\nassistant:", " d"),
    ]


def test_prompts_are_those_of_generation_and_thoughts_are_not_begun_twice(make, tmp_path):
    name = write_tokenizer(tmp_path / "r1", R1)
    text = tokenizer.load(name)
    turns = ("q1", "<think>\nlong thought</think>a1", f"q2{EOS}", "<think>\nmore</think>a2")
    _, prepared = make([talk(*turns, system="sys")], tokenizer=name, sequence_length=256)
    first, second = samples_of(stored_rows(prepared), text.eos_id)
    special = {token: text.encode_template(token)[0] for token in (BOS, USER, ASSISTANT, EOS)}

    def ids(*parts):
        return [i for part in parts for i in ([special[part]] if part in special else text.encode(part))]

    assert first[0] == ids(BOS, "sys", USER, "q1", ASSISTANT, "<think>\n")
    assert first[1] == [*ids("long thought</think>a1"), text.eos_id]
    # The history has lost its thoughts, and what the user spelled is no end of a turn.
    spelled = text.encode(f"q2{EOS}")
    assert special[EOS] not in spelled
    history = [*ids(BOS, "sys", USER, "q1", ASSISTANT, "a1", EOS, USER), *spelled]
    assert second[0] == [*history, *ids(ASSISTANT, "<think>\n")]
    assert second[1] == [*ids("more</think>a2"), text.eos_id]
    asked = talk(*turns, system="sys")["messages"][:-1]
    assert second[0] == conversation_tokens(text, asked, Template(R1, PLAIN_NAMES))
    written = sum(len(f"{thought}</think>{answer}") for thought, answer in (("long thought", "a1"), ("more", "a2")))
    assert prepared.manifest["splits"]["train"]["bytes"] == written


@pytest.mark.parametrize(
    "opening, content, left",
    [
        ("<think>\n", "<think>\nx", "x"),
        ("<think>\n", "<think>x", "x"),
        ("<think>\n", "x<think>\n", "x<think>\n"),
        ("<think>", "<think>\nx", "\nx"),
        ("<think>", "<think>x", "x"),
        ("", "<think>\nx", "<think>\nx"),
    ],
)
def test_what_the_template_begins_is_not_repeated(opening, content, left):
    template = Template("{{ messages[0].content }}:{{ '" + opening.replace("\n", "\\n") + "' }}", PLAIN_NAMES)
    found = answered(BYTES, [{"role": "user", "content": "q"}], content, template)
    assert found == ([*f"q:{opening}".encode()], [*left.encode(), BYTES.eos_id], left)


def test_a_user_cannot_begin_the_thoughts():
    template = Template("{{ messages[0].content }}", PLAIN_NAMES)
    asked = [{"role": "user", "content": "say <think>"}]
    assert answered(BYTES, asked, "<think>x", template).text == "<think>x"


def random_talks(count, seed=0, longest=60):
    rng = random.Random(seed)
    return [talk(f"{i}", "x" * rng.randint(1, longest) + f"{i}") for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_samples_lie_whole_in_one_row_each_once(make, seed):
    length, talks = 256, random_talks(400, seed, longest=120)
    # One that fills a row to its last token, and one that is a token too long for it.
    rest = length - len("user: \nassistant: ") - 1
    talks += [talk("", "f" * rest), talk("", "g" * (rest + 1))]
    _, prepared = make(talks, sequence_length=length)
    rows = stored_rows(prepared)
    assert rows.shape[1] == length + 1 and begins(rows[:, 0]).all() and begins(rows[:, -1]).all()
    assert not is_answer(rows[:, -1]).any() and not (begins(rows) & is_answer(rows)).any()
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])
    assert rows[-1, -1] == BYTES.eos_id | BEGINS
    expected = [
        (f"user: {question}\nassistant:", f" {answer}")
        for question, answer in ((turn["content"] for turn in one["messages"]) for one in talks[:-1])
    ]
    assert sorted(texts_of(rows)) == sorted(expected)
    counts = prepared.manifest["splits"]["train"]
    assert counts["answers"] == is_answer(rows[:, :-1]).sum() == sum(len(answer) + 1 for _, answer in expected)
    used = sum(len(prompt) + len(answer) + 1 for prompt, answer in expected)
    assert counts["padding"] == rows.shape[0] * length - used
    assert counts["padding"] < 0.05 * rows.shape[0] * length
    assert prepared.manifest["skipped"] == {
        f"longer than data.sequence_length = {length}": {
            "count": 1,
            "first": [f"{prepared.manifest['source'][5:]}:402, answer 1 ({length + 1} tokens)"],
        }
    }


def test_few_rows_are_open_at_once(make, monkeypatch):
    """Short of memory for all of them, rows are still whole, and worse filled at worst."""
    monkeypatch.setattr(samples, "OPEN_ROWS", 1)
    _, prepared = make(random_talks(100), sequence_length=96)
    rows = stored_rows(prepared)
    found = [int(prompt.split()[1]) for prompt, _ in texts_of(rows)]
    assert found == list(range(100)) and begins(rows[:, -1]).all()


def test_rows_are_the_same_whenever_and_wherever_they_are_prepared(make, tmp_path):
    dated = "{{ strftime_now('%Y %d %B') }}{% for m in messages %}{{ m.content }}{% endfor %}:"
    name = write_tokenizer(tmp_path / "dated", dated)
    config, first = make(random_talks(200), tokenizer=name)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "talks.jsonl").rename(moved)
    other = dataclasses.replace(config, sources=(f"chat:{moved}",), directory=str(tmp_path / "other"))
    [second] = prepare.prepare(other, progress=False)
    assert first.directory.name != second.directory.name
    assert first.manifest["fingerprint"] == second.manifest["fingerprint"]
    rows = stored_rows(first)
    np.testing.assert_array_equal(rows, stored_rows(second))
    text = tokenizer.load(name)
    assert text.decode(samples_of(rows[:1], text.eos_id)[0][0]).startswith("2025 01 January")
    whole = Loader([first], config, seed=1).rows(range(len(rows)))
    np.testing.assert_array_equal(Loader([second], other, seed=1).rows(range(50, len(rows))), whole[50:])
    assert {row.tobytes() for row in whole} == {row.tobytes() for row in rows}


def test_hostile_lines_are_skipped_by_reason(make):
    good = talk("q", "a")
    text = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    neither = 'neither "messages" nor a text "prompt" with a text "response" or "completion"'
    bad = {
        "not JSON": ["nonsense", '{"messages": [', "[" * 100_000],
        "no JSON object": ["[]", "3"],
        neither: [{}, {"prompt": "q"}, {"prompt": ["q"], "response": "a"}, {"prompt": "q", "completion": None}],
        "no messages": [{"messages": []}, {"messages": None}, {"messages": {"role": "user"}}],
        "a message that is no object": [{"messages": [text, "a"]}],
        "a message without a text as role and content": [
            {"messages": [text, {"role": "assistant", "content": None, "tool_calls": []}]},
            {"messages": [{"content": "q"}, answer]},
            {"messages": [{"role": ["user"], "content": "q"}, answer]},
        ],
        "no turn of the assistant": [{"messages": [text]}],
        "an empty turn of the assistant": [talk("q", " \n"), talk("q", "a", "q", ""), {"prompt": "q", "response": ""}],
        "not Unicode (a lone surrogate)": ['{"prompt": "q", "response": "\\ud800"}'],
    }
    lines = [good, "", *(line for some in bad.values() for line in some), {"prompt": "p", "completion": "c"}]
    _, prepared = make(lines)
    skipped = prepared.manifest["skipped"]
    assert {reason: item["count"] for reason, item in skipped.items()} == {r: len(some) for r, some in bad.items()}
    assert skipped["not JSON"]["first"][0].endswith("talks.jsonl:3")
    assert texts_of(stored_rows(prepared)) == [("user: q\nassistant:", " a"), ("user: p\nassistant:", " c")]
    with pytest.raises(ConfigError, match="no document to train on, skipped 1 no messages.*sequence_length"):
        make([{"messages": []}])


def test_files_are_found_in_folders_and_unpacked(tmp_path):
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(talk("q", "a")))
    (tmp_path / "in" / "b.txt").write_text("no conversation")
    config = DataConfig(sources=(f"chat:{tmp_path}/in",), directory=str(tmp_path / "out"), validation_fraction=0.0)
    [prepared] = prepare.prepare(config, progress=False)
    assert prepared.manifest["skipped"] == {} and len(texts_of(stored_rows(prepared))) == 1
    assert prepared.directory.name.startswith("chat-")
    (tmp_path / "in" / "a.jsonl.gz").unlink()
    with pytest.raises(ConfigError, match="there is no .jsonl file"):
        prepare.prepare(config, progress=False)


def test_conversations_that_the_template_refuses_are_skipped_one_by_one(make, tmp_path):
    picky = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "{{ 1 // (messages | length - 3) }}{{ messages[0].content }}:"
    )
    name = write_tokenizer(tmp_path / "picky", picky)
    lines = [talk("q", "a", system="s"), talk("q", "a", "q", "b")]
    _, prepared = make(lines, tokenizer=name)
    text = tokenizer.load(name)
    [(prompt, answer)] = samples_of(stored_rows(prepared), text.eos_id)
    assert (text.decode(prompt), text.decode(answer)) == ("-1q:", "a")
    start = "the model's chat template cannot render this conversation: "
    assert {reason.removeprefix(start): item["count"] for reason, item in prepared.manifest["skipped"].items()} == {
        "no system, please": 1,
        "integer division or modulo by zero": 1,
    }
    assert any(item["first"][0].endswith(":2, answer 2") for item in prepared.manifest["skipped"].values())


def test_answers_without_a_token_are_skipped(make, tmp_path):
    built = tokenizers.Tokenizer(tokenizers.models.BPE({"s": 0, "y": 1, EOS: 2}, []))
    built.save(str(tmp_path / "letters.json"))
    _, prepared = make([talk("s", "no"), talk("y", "yes")], tokenizer=str(tmp_path / "letters.json"))
    assert prepared.manifest["skipped"]["no token in the answer"]["count"] == 1
    # of "user: y", "assistant:" and " yes"
    assert samples_of(stored_rows(prepared), 2) == [([0, 1, 0, 0, 0], [1, 0, 2])]


def test_turns_of_a_conversation_stay_on_one_side(make):
    talks = [talk(f"{i}", "a", "again", "b" * (i % 9 + 1)) for i in range(300)]
    _, prepared = make(talks, validation_fraction=0.2)
    sides = {
        split: {prompt.split("\n")[0] for prompt, _ in texts_of(stored_rows(prepared, split))}
        for split in ("train", "validation")
    }
    assert not sides["train"] & sides["validation"] and len(sides["train"] | sides["validation"]) == 300
    assert abs(len(sides["validation"]) / 300 - 0.2) < 0.07
    splits = prepared.manifest["splits"]
    assert splits["validation"]["documents"] == len(sides["validation"])
    assert sum(split["samples"] for split in splits.values()) == 600
    _, fewer = make(talks[100:], validation_fraction=0.2)
    kept = {prompt.split("\n")[0] for prompt, _ in texts_of(stored_rows(fewer, "validation"))}
    assert kept <= sides["validation"]


def test_without_a_conversation_to_hold_out_the_last_rows_are(make):
    talks = random_talks(40)
    _, whole = make(talks, sequence_length=96)
    _, prepared = make(talks, sequence_length=96, validation_fraction=1e-9)
    assert prepared.manifest["validation_is_tail"]
    train, validation = stored_rows(prepared), stored_rows(prepared, "validation")
    rows = stored_rows(whole)
    assert len(validation) == 1
    np.testing.assert_array_equal(np.concatenate([train, validation])[:, :-1], rows[:, :-1])
    assert train[-1, -1] == validation[-1, -1] == BYTES.eos_id | BEGINS
    splits, both = prepared.manifest["splits"], whole.manifest["splits"]["train"]
    for name in ("rows", "samples", "answers", "padding", "bytes"):
        assert splits["train"][name] + splits["validation"][name] == both[name], name
    own = splits["validation"]
    assert own["samples"] == len(samples_of(validation)) and own["answers"] == is_answer(validation[:, :-1]).sum()
    assert own["padding"] == 96 - sum(len(prompt) + len(answer) for prompt, answer in samples_of(validation))
    assert own["bytes"] / own["answers"] == pytest.approx(both["bytes"] / both["answers"], rel=0.02)


def test_one_row_cannot_be_trained_on_and_validated(make):
    with pytest.raises(ConfigError, match="^1 samples fill one row of 64 tokens.*more conversations"):
        make([talk("q", "a")], validation_fraction=0.5)


def test_template_and_kind_decide_what_is_reused_and_fim_does_not(make, tmp_path):
    talks = random_talks(20)
    plain = make(talks, tokenizer=write_tokenizer(tmp_path / "plain"), fim_rate=0.0)[1]
    _, same = make(talks, tokenizer=write_tokenizer(tmp_path / "plain"), fim_rate=0.5)
    assert same == plain
    prepared = [plain, *(make(talks, tokenizer=write_tokenizer(tmp_path / "own", t))[1] for t in (R1, R1 + " "))]
    assert len({one.directory for one in prepared}) == len({one.manifest["fingerprint"] for one in prepared}) == 3


def test_kinds_are_not_mixed(tmp_path):
    with pytest.raises(ConfigError, match="^data.sources mixes conversations .chat:x. with plain text .python_stdlib."):
        prepare.check(DataConfig(sources=("python_stdlib", "chat:x")))
    with pytest.raises(ConfigError, match='^unknown source "chat:"'):
        prepare.check(DataConfig(sources=("chat:",)))
    assert DataConfig(sources=("chat:x",)).is_chat and not DataConfig().is_chat


def test_bytes_per_token_are_those_of_the_answers_over_the_mixture(make, tmp_path):
    letters = [talk("a long question", "é" * 9) for _ in range(30)]  # 18 bytes of 20 trained tokens
    config, prepared = make(letters)
    assert Loader([prepared], config, seed=0).bytes_per_token == pytest.approx(18 / 20)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(talk("", "a")) + "\n" for _ in range(30)))
    both = dataclasses.replace(config, sources=(*config.sources, f"chat:{short}"), weights=(3.0, 1.0))
    found = prepare.prepare(both, progress=False)
    # A row of the first holds one sample, one of the second three of a byte in three tokens.
    expected = (3 * 18 + 1 * 3) / (3 * 20 + 1 * 9)
    assert [one.manifest["splits"]["train"]["rows"] for one in found] == [30, 10]
    assert Loader(found, both, seed=0).bytes_per_token == pytest.approx(expected)


def test_manifest_of_text_from_before_there_were_samples_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    config = DataConfig(sources=(f"text_files:{tmp_path}/a.txt",), directory=str(tmp_path / "data"), sequence_length=16)
    [prepared] = prepare.prepare(config, progress=False)
    before = Loader([prepared], config, seed=0).bytes_per_token
    manifest = json.loads((prepared.directory / prepare.MANIFEST).read_text())
    for counts in manifest["splits"].values():
        assert counts.pop("answers") == counts["tokens"]
    (prepared.directory / prepare.MANIFEST).write_text(json.dumps(manifest))
    [old] = prepare.prepare(config, progress=False)
    assert old == prepared and Loader([old], config, seed=0).bytes_per_token == before


def test_marks_are_the_same_on_any_array():
    sample = marked([5, 6], [7, 0])
    assert sample.dtype == np.int32 and sample.tolist() == [5 | BEGINS, 6, 7 | ANSWER, ANSWER]
    for array in (sample, jnp.asarray(sample)):
        assert token_of(array).tolist() == [5, 6, 7, 0] and token_of(array).dtype == np.int32
        assert begins(array).tolist() == [True, False, False, False]
        assert is_answer(array).tolist() == [False, False, True, True]
    # Without a prompt, nothing comes before the first token to predict it from.
    assert marked([], [7, 8]).tolist() == [7 | BEGINS, 8 | ANSWER]
    assert token_of(marked([BEGINS - 1], [0])).tolist() == [BEGINS - 1, 0]
    with pytest.raises(ConfigError, match="smaller vocabulary"):
        marked([1], [BEGINS])


@pytest.mark.parametrize("kind", ["json", "tiktoken"])
def test_a_run_keeps_the_template_with_its_tokenizer(tmp_path, kind):
    name = write_tokenizer(tmp_path / "own", R1)
    if kind == "tiktoken":
        name = str(tmp_path / "own" / "tiktoken.model")
        (tmp_path / "own" / "tiktoken.model").write_text("YQ== 0\n")
        config = {"added_tokens_decoder": {"1": {"content": "[EOS]"}}, "eos_token": "[EOS]"}
        (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "own" / "tokenization_a.py").write_text('pat_str = "."\n')
    (tmp_path / "copy").mkdir()
    tokenizer.load(name).write(tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == R1


def test_perplexity_is_of_texts(tmp_path):
    from dsjax.inference.evaluation import evaluate

    (tmp_path / "a.jsonl").write_text(json.dumps(talk("q", "a")))
    with pytest.raises(ConfigError, match="holds conversations, but --data scores texts"):
        evaluate(str(tmp_path), f"chat:{tmp_path}/a.jsonl")
