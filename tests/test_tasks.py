"""Tasks: any problem at any time, the same everywhere, no text in two splits, and answers that are read, never run."""

import dataclasses
import json
import operator
import random
import re
import time
import tracemalloc
from fractions import Fraction

import pytest

from dsjax.config import ConfigError, TaskConfig
from dsjax.posttraining import tasks
from dsjax.posttraining.answers import expression, number
from dsjax.posttraining.rewards import accuracy_for, format
from dsjax.posttraining.tasks import Problem, make_task

ARITHMETIC = TaskConfig()
LONG = TaskConfig(steps_min=1, steps=8, largest=20, limit=500)
COUNTDOWN = TaskConfig(name="countdown")
LARGE = TaskConfig(name="countdown", numbers=6, largest=100, limit=999)
GENERATED = [ARITHMETIC, LONG, COUNTDOWN, LARGE]
NAMES = ["arithmetic", "long", "countdown", "large"]


@pytest.fixture
def jsonl(tmp_path):
    """Writes lines, dicts as JSON, and returns the task's configuration."""

    def write(lines, **fields) -> TaskConfig:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return TaskConfig(name=f"jsonl:{path}", **fields)

    return write


@pytest.mark.parametrize(
    ("config", "split", "index", "prompt", "answer"),
    [
        (ARITHMETIC, "train", 0, "8+9+6-9=?", "14"),
        (ARITHMETIC, "train", 123456789, "6-1-4*4=?", "4"),
        (ARITHMETIC, "validation", 1, "9+5+4*5=?", "90"),
        (COUNTDOWN, "train", 0, "Use 2, 3, 5, 7 once each to make 3.", "(3*(7-5))/2"),
        (COUNTDOWN, "validation", 123456789, "Use 2, 2, 6, 6 once each to make 8.", "((6*2)+2)-6"),
    ],
)
def test_problems_are_those_of_every_machine(config, split, index, prompt, answer):
    assert make_task(config, 7).problem(index, split) == Problem(prompt, answer, "en")


def test_fingerprint_is_that_of_every_machine_and_tells_what_decides_the_problems(jsonl):
    fingerprint = make_task(ARITHMETIC, 7).fingerprint
    assert fingerprint.startswith("60e022c8199de906")
    same = dataclasses.replace(ARITHMETIC, numbers=5, timeout_seconds=1.0, rewards=("format",))
    assert make_task(same, 7).fingerprint == fingerprint
    others = [dataclasses.replace(ARITHMETIC, **{name: 2}) for name in ("steps", "steps_min", "largest", "limit")]
    others += [dataclasses.replace(ARITHMETIC, validation_fraction=0.2), COUNTDOWN, LARGE]
    assert len({fingerprint, make_task(ARITHMETIC, 8).fingerprint, *(make_task(o, 7).fingerprint for o in others)}) == 9
    before = make_task(jsonl([{"prompt": "a", "answer": 1}]), 7).fingerprint
    assert make_task(jsonl([{"prompt": "a", "answer": 2}]), 7).fingerprint != before


@pytest.mark.parametrize("config", GENERATED, ids=NAMES)
def test_any_order_gives_the_same_problems(config):
    forwards = [make_task(config, 3).problem(index) for index in range(50)]
    task = make_task(config, 3)
    assert [task.problem(index) for index in reversed(range(50))] == forwards[::-1]
    assert len(set(forwards)) > 40
    assert [make_task(config, 4).problem(index) for index in range(50)] != forwards


def test_numpy_indices_give_the_same_problems():
    import numpy as np

    assert make_task(ARITHMETIC, 0).problem(np.int64(5)) == make_task(ARITHMETIC, 0).problem(5)


@pytest.mark.parametrize(("index", "split"), [(-1, "train"), (0, "test")])
def test_what_cannot_be_is_refused(index, split):
    with pytest.raises(ValueError, match="there is no problem"):
        make_task(ARITHMETIC, 0).problem(index, split)


@pytest.mark.parametrize("config", GENERATED, ids=NAMES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_worked_solution_is_right_and_well_formed(config, split):
    task = make_task(config, 1)
    accuracy = accuracy_for(task)
    for index in range(200):
        problem = task.problem(index, split)
        worked = task.worked(problem)
        assert accuracy(problem.prompt, worked, problem.answer) == 1, problem
        assert format(problem.prompt, worked, problem.answer) == 1, problem


def applied(step: str) -> tuple[int, str, int, int]:
    """left, symbol, right and result of a worked step, recomputed: the result that stands there is right."""
    left, symbol, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
    assert operations[symbol](int(left), int(right)) == int(result), step
    return int(left), symbol, int(right), int(result)


@pytest.mark.parametrize("config", [ARITHMETIC, LONG], ids=["arithmetic", "long"])
def test_chains_go_from_left_to_right_within_the_limit(config):
    task, lengths = make_task(config, 2), set()
    for index in range(300):
        problem = task.problem(index)
        thought = task.worked(problem).partition("</think>")[0].removeprefix("<think>")
        first, *rest = re.findall(r"[-+*]?\d+", problem.prompt.removesuffix("=?"))
        result = int(first)
        for part, step in zip(rest, thought.split(";"), strict=True):
            left, symbol, right, after = applied(step)
            assert (left, f"{symbol}{right}") == (result, part)
            assert 1 <= right <= config.largest and 0 <= after <= config.limit
            result = after
        assert str(result) == problem.answer
        lengths.add(len(rest))
    assert lengths == set(range(config.steps_min or config.steps, config.steps + 1))


def test_the_documented_chain_ignores_precedence():
    assert make_task(ARITHMETIC, 0).worked(Problem("7+5-3*2=?", "18")) == (
        "<think>7+5=12;12-3=9;9*2=18</think><answer>18</answer>"
    )


@pytest.mark.parametrize("config", [COUNTDOWN, LARGE], ids=["countdown", "large"])
def test_countdown_is_solved_by_its_own_numbers_without_leaving_the_whole_ones(config):
    task, symbols = make_task(config, 2), set()
    for index in range(300):
        problem = task.problem(index)
        *numbers, target = map(int, re.findall(r"\d+", problem.prompt))
        assert numbers == sorted(numbers) and len(numbers) == config.numbers and numbers[-1] <= config.largest
        assert sorted(map(int, re.findall(r"\d+", problem.answer))) == numbers
        steps = task.worked(problem).partition("</think>")[0].removeprefix("<think>").split(";")
        results = [applied(step)[3] for step in steps]
        assert all(0 < result <= config.limit for result in results) and results[-1] == target
        symbols |= {applied(step)[1] for step in steps}
    assert symbols == set("+-*/")


@pytest.mark.parametrize(
    "config",
    [
        TaskConfig(steps=1, largest=2, limit=3, validation_fraction=0.5),
        TaskConfig(name="countdown", numbers=2, largest=2, limit=3, validation_fraction=0.5),
    ],
    ids=["arithmetic", "countdown"],
)
def test_splits_share_no_text_however_few_there_are_whatever_the_seed(config):
    sides = {
        split: {make_task(config, seed).problem(index, split).prompt for index in range(100) for seed in (0, 1)}
        for split in ("train", "validation")
    }
    assert sides["train"] and sides["validation"]
    assert not sides["train"] & sides["validation"]


def test_an_empty_split_is_told(monkeypatch, jsonl):
    monkeypatch.setattr(tasks, "TRIES", 100)
    for config in (TaskConfig(validation_fraction=0.0), jsonl([{"prompt": "a", "answer": 1}], validation_fraction=0.0)):
        with pytest.raises(ConfigError, match="has no problem for the validation split .* = 0.0"):
            make_task(config, 0).problem(0, "validation")
        assert make_task(config, 0).problem(0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_a_shuffle_is_a_permutation_and_each_key_has_its_own(size):
    shuffles = [[tasks._shuffled(i, size, key) for i in range(size)] for key in ("a", "b")]
    assert all(sorted(shuffle) == list(range(size)) for shuffle in shuffles)
    if size > 7:
        assert shuffles[0] != shuffles[1] and shuffles[0] != list(range(size))


def test_a_file_gives_each_of_its_lines_once_an_epoch(jsonl):
    rows = [{"prompt": f"{i} + 1 = ?", "answer": i + 1} for i in range(60)]
    config = jsonl([*rows, "  "], validation_fraction=0.3, language="zh")
    task = make_task(config, 5)
    size = {split: len({task.problem(i, split).prompt for i in range(600)}) for split in ("train", "validation")}
    assert size["train"] + size["validation"] == 60 and min(size.values()) > 5
    epochs = [[task.problem(i) for i in range(e * size["train"], (e + 1) * size["train"])] for e in range(3)]
    assert len(set(epochs[0])) == size["train"] and set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    for prompt, answer, language in epochs[0]:
        assert int(prompt.split()[0]) + 1 == int(answer) and language == "zh"


def test_lines_of_a_file_may_be_called_otherwise(jsonl):
    lines = [
        {"question": "a\u2028b", "answer": "She has 3 + 4 = 7.\n#### 1,007"},
        {"problem": "c", "answer": 0.10},
        {"prompt": "d", "question": "e", "answer": " $3/4. "},
    ]
    config = jsonl([json.dumps(line, ensure_ascii=False) for line in lines], validation_fraction=0.0)
    problems = {make_task(config, 0).problem(index)[:2] for index in range(3)}
    assert problems == {("a\u2028b", "1,007"), ("c", "0.1"), ("d", "$3/4.")}


def test_a_file_has_no_worked_solutions(jsonl):
    task = make_task(jsonl([{"prompt": "a", "answer": 1}]), 0)
    with pytest.raises(ConfigError, match="has answers but no worked solutions; take arithmetic or countdown"):
        task.worked(task.problem(0))


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[" * 100_000,
        [1],
        {"answer": 1},
        {"prompt": "a"},
        {"prompt": "a", "answer": "seven"},
        {"prompt": "a", "answer": True},
        {"prompt": ["a"], "answer": 1},
        {"prompt": "a", "answer": float("nan")},
        {"prompt": "a \ud800", "answer": 1},
    ],
    ids=lambda line: str(line)[:20].encode("ascii", "replace").decode(),
)
def test_a_bad_line_is_told_with_its_number(jsonl, line):
    config = jsonl([{"prompt": "a", "answer": 1}, "", line])
    with pytest.raises(
        ConfigError, match='problems.jsonl, line 3, must be a JSON object with a text "prompt"'
    ) as caught:
        make_task(config, 0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_that_gives_nothing_is_told(tmp_path, jsonl):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        make_task(TaskConfig(name=f"jsonl:{tmp_path}/none.jsonl"), 0)
    with pytest.raises(ConfigError, match="holds no problem"):
        make_task(jsonl([""]), 0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot be read \(not UTF-8\)"):
        make_task(TaskConfig(name=f"jsonl:{tmp_path}/binary"), 0)


def test_an_unknown_task_is_told():
    with pytest.raises(ConfigError, match='unknown task.name "countdwn"; did you mean countdown?'):
        make_task(TaskConfig(name="countdwn"), 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" -18 \n", -18),
        ("1,000", 1000),
        ("1,234,567.50", Fraction("1234567.5")),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6/8", Fraction(-3, 4)),
        ("$5", 5),
        ("-$5", -5),
        ("50%", 50),
        ("18.", 18),
        ("007", 7),
        ("0.1", Fraction(1, 10)),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "-", "$", "%", "/", "1/0", "3/4/5", "1.5/2", "10,00", "1,0000", ",100", "1e3", "0x10", "1_000"]
    + [
        "1 000",
        "--1",
        "+1",
        "seven",
        "7 apples",
        "٣",
        "３",
        "²",
        "1\x000",
        "1\ud800",
        "nan",
        "inf",
        "9" * 101,
        "1.2.3",
    ],
)
def test_what_is_no_number_is_none(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("((3+7)*25)-50", True),
        (" 25 * (7 + 3) - 50\n", True),
        ("50*25/(7-3)", False),
        ("(50*3+50)", False),
        ("3+7+25+50+115", False),
        ("(3+7)*25-50+0", False),
        ("200", False),
        ("25*(7--3)-50", False),
        ("25*(7+3)-50=200", False),
        ("2*5*(7+3)-50", False),
        ("25*(7+3)-5_0", False),
        ("(3+7)*25-50 if 1 else 0", False),
    ],
)
def test_countdown_takes_any_expression_of_exactly_its_numbers(given, right):
    assert make_task(COUNTDOWN, 0).check(given, "((3+7)*25)-50") is right


def test_fractions_on_the_way_are_exact():
    assert make_task(COUNTDOWN, 0).check("8/(3-8/3)", "24*8/8+3-3") is False
    assert expression("8/(3-8/3)").value == 24
    assert expression("1/3+1/3+1/3").value == 1


HOSTILE = {
    "power": "9**9**9",
    "floor division": "7//2",
    "shift": "1<<99999999",
    "call": "__import__('os').system('true')",
    "name": "exit",
    "attribute": "(1).__class__",
    "lambda": "(lambda: 1)()",
    "comparison": "1==1",
    "tuple": "1,2",
    "empty tuple": "()",
    "call of a number": "3(4)",
    "float": "1.5",
    "exponent": "1e9",
    "complex": "1j",
    "sign": "-1",
    "signs": "1" + "-" * 900 + "1",
    "many signs": "1" + "+-" * 450_000 + "1",
    "division by zero": "1/(1-1)",
    "deep": "(" * 400 + "1" + ")" * 400,
    "very deep": "(" * 5_000_000 + "1" + ")" * 5_000_000,
    "long sum": "+".join("1" * 500),
    "longer sum": "1" + "+1" * 5_000_000,
    "long number": "9" * 10_000_000,
    "hidden octal": "017",
    "null": "1\x00+1",
    "surrogate": "1\ud800+1",
    "Arabic digits": "٣+٤",
    "full width": "３＋４",
    "line continuation": "1+\\\n1",
    "two lines": "1\n+1",
    "comment": "1+1#2",
    "nothing": "",
    "blanks": " " * 10_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_are_no_expressions_and_cost_nothing(text):
    tracemalloc.start()
    begun = time.perf_counter()
    assert expression(text) is None
    assert time.perf_counter() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_random_texts_of_the_allowed_signs_never_raise():
    draw = random.Random(0)
    found = sum(
        expression("".join(draw.choices("0123456789+-*/() ", k=draw.randint(1, 12)))) is not None for _ in range(3000)
    )
    assert 50 < found < 2950


def test_the_largest_problem_that_can_be_asked_for_is_read():
    config = TaskConfig(name="countdown", numbers=32, largest=10**12, limit=10**12)
    task = make_task(config, 0)
    problem = task.problem(0)
    assert accuracy_for(task)(problem.prompt, task.worked(problem), problem.answer) == 1
