"""Rewards by rule, and a judge that no reward and no completion can stop."""

import os
import signal
import time
from pathlib import Path

import pytest

from dsjax.config import ConfigError, TaskConfig
from dsjax.posttraining import worker
from dsjax.posttraining.rewards import (
    Judge,
    accuracy_for,
    format,
    language_consistency_for,
    load_reward,
    make_judge,
)
from dsjax.posttraining.tasks import make_task

TASK = make_task(TaskConfig(), 0)
COUNTDOWN = make_task(TaskConfig(name="countdown"), 0)
GOOD = "<think>7+5=12</think><answer>12</answer>"


@pytest.fixture
def user(tmp_path):
    """Writes a file with the body of `reward(prompt, completion, answer)`, and loads it."""

    def write(body: str, before: str = ""):
        path = tmp_path / "mine.py"
        lines = "\n    ".join(body.splitlines())
        path.write_text(f"{before}\ndef reward(prompt, completion, answer):\n    {lines}\n")
        return load_reward(f"{path}:reward")

    return write


def judged(reward, completions, seconds=5.0):
    """What a judge makes of completions by one reward: (parts, failed, reasons)."""
    with Judge({"mine": (reward, 1.0)}, seconds) as judge:
        result = judge(["p"] * len(completions), completions, ["a"] * len(completions))
    assert result.total == result.parts["mine"]
    return result.total, result.failed, result.reasons


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (GOOD, 1),
        ("12", 0),
        ("<answer>12</answer>", 1),
        ("<answer> 12.0\n</answer> and more", 1),
        ("<answer>13</answer><answer>12</answer>", 1),
        ("<answer>12</answer><answer>13</answer>", 0),
        ("<answer>12</answer><answer>13", 1),
        ("<answer>13<answer>12</answer>", 1),
        ("</answer>12<answer>", 0),
        ("<answer>12", 0),
        ("<answer>12 or 13</answer>", 0),
        ("<answer></answer>", 0),
        ("", 0),
    ],
)
def test_accuracy_is_that_of_the_last_answer(completion, value):
    assert accuracy_for(TASK)("7+5=?", completion, "12") == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (GOOD, 1),
        (f" \n{GOOD}\n", 1),
        ("<think>a\nb</think>\n<answer>c</answer>", 1),
        (f"So: {GOOD}", 0),
        (f"{GOOD}.", 0),
        ("<think>a</think>b<answer>c</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        (f"{GOOD}{GOOD}", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a<answer>c</answer></think>", 0),
        ("<think>a<answer></think>c</answer>", 0),
        ("<answer><think>a</think>c</answer>", 0),
        ("<think>a</think><answer>c", 0),
        ("<Think>a</Think><answer>c</answer>", 0),
        ("", 0),
    ],
)
def test_format_is_exactly_one_thought_and_one_answer(completion, value):
    assert format("p", completion, "a") == value


@pytest.mark.parametrize(
    ("completion", "english", "chinese"),
    [
        ("<think>I add the two</think><answer>十二</answer>", 1, 0),
        ("<think>七加五</think><answer>twelve</answer>", 0, 1),
        ("<think>so 七加五</think>", 1 / 4, 3 / 4),
        ("a prompt that ends in a tag</think><answer>五</answer>", 1, 0),
        ("七 and no tag", 3 / 4, 1 / 4),
        ("<think>naïve idea</think>", 1 / 2, 0),
        ("<think>да нет</think>", 0, 0),
        (GOOD, 1, 1),
        ("<think> </think>", 0, 0),
        ("", 0, 0),
    ],
)
def test_language_is_counted_by_the_words_of_the_thought(completion, english, chinese):
    assert language_consistency_for("en")("p", completion, "a") == pytest.approx(english)
    assert language_consistency_for("zh")("p", completion, "a") == pytest.approx(chinese)


HOSTILE = {
    "long word": "a" * 10_000_000,
    "blanks": "<think>" + " " * 10_000_000,
    "open tags": "<answer>" * 1_000_000,
    "closed tags": "</answer>" * 1_000_000,
    "thoughts": "<think></think>" * 600_000,
    "half tags": "<answer" * 1_400_000,
    "mixed letters": "aé" * 5_000_000,
    "long answer": "<answer>" + "9" * 10_000_000 + "</answer>",
    "deep answer": "<answer>" + "(" * 10_000_000 + "</answer>",
    "power": "<answer>9**9**9</answer>",
    "null": "<answer>\x0012</answer>",
    "surrogates": "<think>\ud800\udfff</think><answer>\ud83d</answer>",
    "digits of other scripts": "<answer>١٢</answer>",
}


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("task", [TASK, COUNTDOWN], ids=["arithmetic", "countdown"])
def test_hostile_completions_get_nothing_and_take_no_time(task, completion):
    begun = time.perf_counter()
    config = TaskConfig(rewards=("accuracy", "format", "language_consistency"))
    reference = "12" if task is TASK else "3*4"
    with make_judge(config, task) as judge:
        result = judge(["p"], [completion], [reference])
    assert result.failed == 0 and result.parts["accuracy"] == [0]
    assert result.parts["format"] == [completion.startswith("<think>\ud800")]
    assert time.perf_counter() - begun < 8


def test_totals_are_weighted_and_parts_are_not():
    config = TaskConfig(rewards=("accuracy", "format"), weights=(2.0, -0.5))
    with make_judge(config, TASK) as judge:
        result = judge(["p"] * 3, [GOOD, "<answer>12</answer>", "12"], ["12", "12", "12"])
    assert result.total == [1.5, 2.0, 0.0]
    assert result.parts == {"accuracy": [1, 1, 0], "format": [1, 0, 0]}
    assert (result.failed, result.reasons) == (0, [])
    assert result.is_right == [False, True, False]  # the first has what counts against it


def test_a_large_reward_makes_up_for_no_other():
    large = lambda prompt, completion, answer: 5.0 if completion == "long" else 0.0  # noqa: E731
    right = lambda prompt, completion, answer: float(completion == "right")  # noqa: E731
    for weight, expected in ((1.0, [False, False]), (-1.0, [False, True]), (0.0, [False, True])):
        with Judge({"large": (large, weight), "right": (right, 1.0)}) as judge:
            assert judge(["p"] * 2, ["long", "right"], ["a"] * 2).is_right == expected


def test_each_completion_has_its_own_prompt_and_answer(user):
    reward = user("return len(prompt) + 10 * len(completion) + 100 * len(answer)")
    for place in (reward, reward.function):
        with Judge({"mine": (place, 1.0)}) as judge:
            assert judge(["p", "pp"], ["", "ccc"], ["a", ""]).total == [101, 32]


def test_every_reward_is_told_as_it_is_known(user):
    told = []
    with Judge({"mine": (user("return 1 / 0"), 1.0), "format": (format, 1.0)}) as judge:
        judge(["p"] * 3, ["c"] * 3, ["a"] * 3, lambda: told.append(1))
    assert len(told) == 6


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError), make_judge(TaskConfig(), TASK) as judge:
        judge(["p"], [GOOD, GOOD], ["12", "12"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('no such thing')", "mine: KeyError: 'no such thing'"),
        ("return float('nan')", "mine: returned nan"),
        ("return -float('inf')", "mine: returned -inf"),
        ("return 10**1000", "mine: OverflowError: int too large to convert to float"),
        ("return 'one'", "mine: returned str, not a number"),
        ("return None", "mine: returned NoneType, not a number"),
        ("return 1j", "mine: returned complex, not a number"),
        ("raise ValueError('x' * 10**6 + chr(10))", f"mine: ValueError: {'x' * 200}"),
        ("class Odd(Exception):\n    def __str__(self): raise self\nraise Odd", "mine: Odd"),
        ("return reward(prompt, completion, answer)", "mine: RecursionError: maximum recursion depth exceeded"),
    ],
)
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "process"])
def test_a_reward_that_is_none_counts_as_nothing_and_as_failed(user, body, reason, inline):
    reward = user(f"if completion == 'good':\n    return True\n{body}")
    total, failed, reasons = judged(reward.function if inline else reward, ["bad", "good", "bad"])
    assert total == [0, 1, 0] and failed == 2
    assert len(reasons) == 1 and reasons[0].startswith(reason)


STUCK = {
    "sleep": "import time\ntime.sleep(60)",
    "loop": "while True: pass",
    "regular expression": "import re\nre.match('(a+)+b', 'a' * 60)",
    "deaf": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
}


@pytest.mark.parametrize("body", STUCK.values(), ids=STUCK.keys())
def test_a_reward_that_hangs_is_killed_and_begun_again(user, body):
    reward = user(f"import os\nif completion == 'good': return os.getpid()\n{body}")
    begun = time.perf_counter()
    total, failed, reasons = judged(reward, ["good", "good", "bad", "good"], seconds=0.5)
    assert time.perf_counter() - begun < 20
    assert failed == 1 and reasons == ["mine: took more than 0.5 s"] and total[2] == 0
    first, again, _, other = map(int, total)
    assert first == again != other
    assert not any(Path(f"/proc/{pid}").exists() for pid in (first, other))


@pytest.mark.parametrize("body", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_reward_that_ends_its_process_ends_nothing_else(user, body):
    reward = user(f"if completion == 'bad': {body}\nreturn 1", "import os")
    assert judged(reward, ["bad", "good", "bad"]) == ([0, 1, 0], 2, ["mine: its process ended"])


def test_a_reward_that_exits_stays(user):
    reward = user("if completion == 'bad': raise SystemExit(1)\nreturn os.getpid()", "import os")
    (first, nothing, last), failed, reasons = judged(reward, ["good", "bad", "good"])
    assert first == last != nothing == 0 and (failed, reasons) == (1, ["mine: SystemExit: 1"])


def test_what_a_reward_started_ends_with_it(user, tmp_path):
    reward = user(
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "child.wait()",
        "import subprocess",
    )
    assert judged(reward, ["bad"], seconds=1.0)[1] == 1
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_process_ends_when_nobody_is_left(user):
    reward = user("return os.getpid()", "import os")
    judge = Judge({"mine": (reward, 1.0)})
    (pid,) = judge([""], [""], [""]).total
    process, ours = judge._workers["mine"]._running
    assert process.pid == pid
    ours.close()
    assert process.wait(10) == 0
    judge.close()


@pytest.mark.slow
def test_a_process_that_hangs_ends_when_nobody_is_left(user):
    judge = Judge({"mine": (user("import re\nre.match('(a+)+b', completion)\nreturn 1"), 1.0)}, timeout_seconds=0.5)
    assert judge([""], [""], [""]).total == [1]
    process, ours = judge._workers["mine"]._running
    worker._send(ours, ["", "a" * 60, ""])
    ours.close()
    assert process.wait(0.5 + worker.GRACE_SECONDS + 10) == -signal.SIGALRM
    judge.close()


def test_closed_twice_and_used_again(user):
    judge = Judge({"mine": (user("return 2"), 1.0)})
    judge.close()
    assert judge([""], [""], [""]).total == [2]
    judge.close()
    judge.close()
    with judge:
        assert judge([""], [""], [""]).total == [2]


def test_no_process_before_the_first_call_and_none_for_rules(user):
    with Judge({"mine": (user("return 1"), 1.0), "format": (format, 1.0)}) as judge:
        assert judge._workers["mine"]._running is None
        judge([], [], [])
        assert judge._workers["mine"]._running is None and set(judge._workers) == {"mine"}


def test_texts_reach_the_process_as_they_are(user):
    text = '\ud800\x00\u2028\n"é十' + "x" * 10_000_000
    reward = user("return completion == '\\ud800\\x00\\u2028\\n\"é十' + 'x' * 10_000_000")
    assert judged(reward, [text, text[1:]]) == ([1, 0], 0, [])


def test_what_a_reward_prints_spoils_nothing(user, capfd):
    reward = user("print('noise', flush=True)\nos.write(1, b'noise')\nreturn input and 1", "import os")
    assert judged(reward, ["c"]) == ([1], 0, [])
    assert capfd.readouterr().out == ""


def test_the_process_reads_no_input_and_takes_no_chips(user):
    reward = user("return os.environ['JAX_PLATFORMS'] == 'cpu' and sys.stdin.read() == ''", "import os, sys")
    assert judged(reward, ["c"]) == ([1], 0, [])


def test_the_process_finds_what_the_run_finds(user, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert judged(user("return beside.VALUE", "import beside"), ["c"]) == ([3], 0, [])


def test_a_run_keeps_the_reward_it_was_begun_with(user):
    reward = user("return 1")
    Path(reward.file).write_text("changed, and no Python")
    assert judged(reward, ["c"]) == ([1], 0, [])


def test_a_file_that_cannot_be_loaded_again_is_tried_a_few_times(user, tmp_path):
    mark = tmp_path / "loads"
    reward = user("return 1", f"open({str(mark)!r}, 'a').write('x')\nif len(open({str(mark)!r}).read()) > 1: 1 / 0")
    total, failed, reasons = judged(reward, ["c"] * 5)
    assert (total, failed) == ([0] * 5, 5)
    assert reasons == ["mine: its file could not be loaded again (ZeroDivisionError: division by zero)"]
    assert len(mark.read_text()) == 1 + worker.FAILED_STARTS


def test_a_process_that_cannot_start_is_a_failure(user, monkeypatch):
    reward = user("return 1")
    monkeypatch.setattr(worker.sys, "executable", "/nowhere/python")
    total, failed, reasons = judged(reward, ["c"])
    assert (total, failed) == ([0], 1) and reasons[0].startswith("mine: its process could not be started (FileNotFound")


def test_an_interrupted_call_leaves_no_late_answer_behind(user, monkeypatch):
    reward = user("return len(completion)")
    with Judge({"mine": (reward, 1.0)}) as judge:
        assert judge([""], ["c"], [""]).total == [1]
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(worker, "_receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            judge([""], ["cc"], [""])
        assert judge([""], ["ccc"], [""]).total == [3]


def test_descriptors_are_given_back(user):
    reward = user("os._exit(1)", "import os")
    before = len(os.listdir("/proc/self/fd"))
    judged(reward, ["c"] * 3)
    assert len(os.listdir("/proc/self/fd")) == before


def test_make_judge_binds_task_language_and_files(user):
    file = user("return 0.25").file
    config = TaskConfig(rewards=("language_consistency", f"{file}:reward"), weights=(1.0, 4.0), language="zh")
    with make_judge(config, make_task(config, 0)) as judge:
        result = judge(["p"], ["<think>七加五</think>"], ["12"])
    assert result.parts == {"language_consistency": [1], f"{file}:reward": [0.25]} and result.total == [2]


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("x = 1", "reward", "has no function reward(prompt, completion, answer); define it, or name another"),
        ("reward = 1", "reward", "has no function reward(prompt, completion, answer)"),
        ("def reward(text): pass", "reward", "takes (text), but is called with (prompt, completion, answer)"),
        ("def reward(*, prompt): pass", "reward", "takes (*, prompt), but is called with"),
        ("def reward(:", "reward", "cannot be run (SyntaxError: invalid syntax"),
        ("import nowhere", "reward", "cannot be run (ModuleNotFoundError: No module named 'nowhere')"),
        ("open('/nowhere')", "reward", "cannot be run (FileNotFoundError: "),
        ("raise SystemExit", "reward", "cannot be run (SystemExit)"),
        ("a = 1\x00", "reward", "cannot be run ("),
        ("def reward(*texts): pass", "re ward", "names no reward of a file; write FILE.py:FUNCTION"),
    ],
)
def test_a_file_without_a_reward_is_told_in_one_sentence(tmp_path, text, name, sentence):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{path}:{name}")
    assert sentence in str(caught.value) and "\n" not in str(caught.value) and "mine.py" in str(caught.value)


@pytest.mark.parametrize("text", ["", "accuracy", "mine.py", "mine.py:", "mine.txt:reward", ":reward"])
def test_what_names_no_file_is_told(text):
    with pytest.raises(ConfigError, match="names no reward of a file; write FILE.py:FUNCTION"):
        load_reward(text)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the reward file .*none.py \(No such file or directory\)"):
        load_reward(f"{tmp_path}/none.py:reward")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.py \(it is not UTF-8 text\); give the path of a Python file"):
        load_reward(f"{tmp_path}/binary.py:reward")


def test_functions_without_a_signature_and_with_defaults_are_taken(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("reward = max\ndef other(prompt, completion, answer, strict=True): return 1")
    assert load_reward(f"{path}:reward").function is max
    assert load_reward(f"{path}:other")("p", "c", "a") == 1
