"""Signals: the first is obeyed in order, a second one at once."""

import signal
import subprocess
import sys

import pytest

from dsjax.training.interrupt import Interrupt

WORKER = """
import sys, time
from dsjax.training.interrupt import Interrupt
with Interrupt() as interrupt:
    interrupt.has_begun = sys.argv[1] == "begun"
    print("ready", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and not (interrupt.requested and sys.argv[2] == "obey"):
        time.sleep(0.01)
    print("requested", interrupt.requested.name if interrupt.requested else None)
"""


# The same while an event loop runs in the main thread, which takes the signals' pipe for itself.
IN_A_LOOP = WORKER.replace(
    "    while time.monotonic()",
    """    import uvloop, asyncio
    async def work():
        while time.monotonic() < end and not (interrupt.requested and sys.argv[2] == "obey"):
            await asyncio.sleep(0.01)
    uvloop.new_event_loop().run_until_complete(work())
    while time.monotonic()""",
)


def run(begun: str, obey: str, *numbers: signal.Signals, worker: str = WORKER) -> tuple[int, str]:
    command = [sys.executable, "-c", worker, begun, obey]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.readline()
    for place, number in enumerate(numbers):
        if place > 0:  # the answer to the one before: an empty line and a sentence
            output += process.stdout.readline() + process.stdout.readline()
        process.send_signal(number)
    output += process.communicate(timeout=15)[0]
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    code, output = run("begun", "obey", number)
    assert code == 0 and f"requested {number.name}" in output and "once more to leave at once" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_signal_is_lost_while_an_event_loop_runs(number):
    code, output = run("begun", "obey", number, worker=IN_A_LOOP)
    assert code == 0 and f"requested {number.name}" in output
    code, output = run("begun", "ignore", number, number, worker=IN_A_LOOP)
    assert code == 128 + number and "leaving without saving" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(number, code):
    returned, output = run("begun", "ignore", number, number)
    assert returned == code and "leaving without saving" in output and "requested" not in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_before_the_first_step_one_signal_is_enough(number, code):
    returned, output = run("not yet", "ignore", number)
    assert returned == code and "nothing to save" in output


def test_afterwards_signals_are_what_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
