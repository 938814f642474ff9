"""A run that hangs says where, and ends; one that does not is left alone."""

import subprocess
import sys
import time

import pytest

from dsjax.training.watchdog import Watchdog

HANG = """
import ctypes, sys, threading, time
from dsjax.training.watchdog import Watchdog

def collective_that_waits_for_ever():
    if sys.argv[1] == "holding the lock":
        ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter's lock, so that no Python runs
    threading.Event().wait(60)

with Watchdog(0.5) as watchdog:
    print("begun", flush=True)
    collective_that_waits_for_ever()
"""


@pytest.mark.parametrize("how", ["as usual", "holding the lock"])
def test_a_hung_process_tells_where_it_hangs_and_exits(how):
    start = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", HANG, how], capture_output=True, text=True, timeout=50)
    assert ran.returncode == 1
    assert "in collective_that_waits_for_ever" in ran.stderr
    if how == "as usual":
        assert "no step has ended for 0.5 s (monitor.watchdog_seconds)" in ran.stderr
    assert time.monotonic() - start < 40


def test_one_that_lives_is_left_alone():
    with Watchdog(0.4) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
    time.sleep(0.5)


def test_it_can_be_turned_off():
    with Watchdog(None) as watchdog:
        watchdog.beat()
