"""Who is who: from flags, from each engine's variables, and what is said where they are incomplete or disagree."""

import os
import socket
import subprocess
import sys
import time

import pytest

from dsjax.config import ConfigError
from dsjax.training.cluster import Membership, find, join

SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t,t-2.t,t-3.t", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0-0.s"}
KUBERNETES = {"JAX_COORDINATOR_ADDRESS": "run-w-0-0.run", "NNODES": "16", "JOB_COMPLETION_INDEX": "0"}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    "environment, coordinator, processes, process, source",
    [
        (SKYPILOT, "10.0.0.4:8476", 2, 1, "SkyPilot"),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": "fd00::1", "SKYPILOT_NODE_RANK": "0"}, "[fd00::1]:8476", 1, 0, "SkyPilot"),
        (TPU, "t-0.t:8476", 4, 2, "a TPU slice"),
        (TPU | SLICES, "s0-0.s:8476", 12, 6, "a TPU slice"),
        (TPU | SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": "s0-0.s:8080"}, "s0-0.s:8476", 12, 6, "a TPU slice"),
        (KUBERNETES, "run-w-0-0.run:8476", 16, 0, "Kubernetes"),
        (KUBERNETES | {"JAX_COORDINATOR_PORT": "3389", "NODE_RANK": "0"}, "run-w-0-0.run:3389", 16, 0, "Kubernetes"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1234", "NNODES": "2", "NODE_RANK": "1"}, "a:1234", 2, 1, "Kubernetes"),
        (SLURM, "gpu07:61445", 32, 9, "Slurm"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "", "SLURM_STEP_ID": ""}, "gpu07:61444", 64, 9, "Slurm"),
        (SLURM | {"SLURM_STEP_NODELIST": "n5"}, "n5:61445", 32, 9, "Slurm"),
        (SLURM | {"SLURM_STEP_NODELIST": "n5,n[6-7]"}, "n5:61445", 32, 9, "Slurm"),
        (SLURM | {"SLURM_STEP_NODELIST": "r[1-2]n[003,7].x,y"}, "r1n003.x:61445", 32, 9, "Slurm"),
    ],
)
def test_an_engine_tells_the_place(environment, coordinator, processes, process, source):
    found = find(environment)
    assert (found.coordinator, found.processes, found.process, found.source) == (
        coordinator,
        processes,
        process,
        source,
    )


def test_nothing_is_found_where_nothing_is_told():
    assert find({}) is None
    assert find({"PATH": "/bin", "SKYPILOT_NODE_IPS": "", "NNODES": "4", "NODE_RANK": "1"}) is None


def test_three_flags_win_over_every_engine():
    found = find(SLURM | SKYPILOT, "[::1]:99", 5, 4)
    assert found == Membership("[::1]:99", 5, 4, "the command line")


def test_every_task_of_one_job_finds_the_same_coordinator_and_its_own_number():
    found = [find(SLURM | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i // 8)}) for i in range(32)]
    assert {one.coordinator for one in found} == {"gpu07:61445"}
    assert [one.process for one in found] == list(range(32))


def test_engines_that_agree_may_both_be_there():
    both = SKYPILOT | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert find(both).source == "SkyPilot"
    assert find(TPU | {"JOB_COMPLETION_INDEX": "2"}).source == "a TPU slice"  # every pod of an indexed Job has it
    assert find(SKYPILOT | {"SLURM_JOB_ID": "7"}).source == "SkyPilot"


@pytest.mark.parametrize(
    "visible, changes, devices",
    [
        ("0,1,2,3,4,5,6,7", {}, (1,)),
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, (4, 5, 6, 7)),
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": "8,4(x2)"}, (2, 3)),
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, None),
        ("0,1,2,3,4,5,6,7", {"SLURM_STEP_TASKS_PER_NODE": ""}, None),
        ("0", {"SLURM_GPUS_ON_NODE": "8"}, None),
        ("0,1", {"SLURM_GPUS_PER_TASK": "2"}, None),
        ("", {}, None),
    ],
)
def test_a_slurm_task_takes_its_share_of_the_gpus_that_it_sees(visible, changes, devices):
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": visible} | changes).local_devices == devices


@pytest.mark.parametrize(
    "environment, flags, sentence",
    [
        (
            {},
            ("a:1", 2, None),
            "--process missing: give --coordinator HOST:PORT, --processes N and --process I together",
        ),
        ({}, (None, None, 1), "--coordinator and --processes missing"),
        ({}, ("a:1", 2, 2), "--process is 2, but --processes makes 2: it must be from 0 to 1"),
        ({}, ("a:1", 2, -1), "--process is -1"),
        ({}, ("a:1", 0, 0), "--processes is 0, but must be at least 1"),
        ({}, ("a", 2, 0), "'a' (by the command line) must be HOST:PORT, as in node1:8476"),
        ({}, ("a:99999", 2, 0), "must be HOST:PORT"),
        ({}, (":80", 2, 0), "must be HOST:PORT"),
        (
            {"SKYPILOT_NODE_RANK": "0"},
            (),
            "this looks like SkyPilot (SKYPILOT_NODE_RANK), but SKYPILOT_NODE_IPS missing",
        ),
        (
            SKYPILOT | {"SKYPILOT_NODE_RANK": "2"},
            (),
            "SKYPILOT_NODE_RANK is 2, but the lines of SKYPILOT_NODE_IPS makes 2",
        ),
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "x"}, (), "SKYPILOT_NODE_RANK is 'x', but must be a whole number"),
        ({"TPU_WORKER_ID": "0"}, (), "but TPU_WORKER_HOSTNAMES missing"),
        (TPU | {"TPU_WORKER_ID": "4"}, (), "TPU_WORKER_ID is 4, but the names in TPU_WORKER_HOSTNAMES makes 4"),
        (
            TPU | {"MEGASCALE_NUM_SLICES": "2"},
            (),
            "several TPU slices (MEGASCALE_NUM_SLICES), but MEGASCALE_SLICE_ID and",
        ),
        (TPU | SLICES | {"MEGASCALE_SLICE_ID": "3"}, (), "MEGASCALE_SLICE_ID is 3, but MEGASCALE_NUM_SLICES makes 3"),
        ({"JOB_COMPLETION_INDEX": "1"}, (), "but JAX_COORDINATOR_ADDRESS and NNODES missing"),
        (KUBERNETES | {"NODE_RANK": "3"}, (), "JOB_COMPLETION_INDEX is 0, but NODE_RANK is 3"),
        (KUBERNETES | {"NNODES": "0"}, (), "NNODES is 0, but must be at least 1"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (), "start the command with srun"),
        (SLURM | {"SLURM_PROCID": "32"}, (), "SLURM_PROCID is 32, but SLURM_STEP_NUM_TASKS makes 32"),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"},
            (),
            "3 GPUs of this node cannot be divided over its 2 tasks",
        ),
        (
            SLURM | SKYPILOT,
            (),
            "by SkyPilot this is process 1 of 2, but by Slurm this is process 9 of 32; say which with --coordinator",
        ),
    ],
)
def test_what_is_incomplete_or_contradictory_is_one_sentence(environment, flags, sentence):
    with pytest.raises(ConfigError) as told:
        find(environment, *flags)
    assert sentence in str(told.value) and "\n" not in str(told.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def joined(port: int, processes: int, process: int, timeout: float = 2) -> subprocess.CompletedProcess:
    member = f"Membership('127.0.0.1:{port}', {processes}, {process}, 'a test')"
    code = f"from dsjax.training.cluster import Membership, join; join({member}, {timeout})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_a_coordinator_that_is_not_there_is_told_after_the_timeout():
    port, start = free_port(), time.monotonic()
    ran = joined(port, 2, 1)
    assert ran.returncode == 1 and time.monotonic() - start < 30
    assert ran.stderr.splitlines()[-1].startswith(
        f"dsjax: process 1 of 2 found no coordinator at 127.0.0.1:{port} within 2 s (a test)"
    )


def test_processes_that_never_come_are_told_after_the_timeout():
    port = free_port()
    ran = joined(port, 2, 0)
    assert ran.returncode == 1
    assert f"dsjax: not all 2 processes came together at 127.0.0.1:{port} within 2 s (a test)" in ran.stderr


def test_a_port_that_is_taken_is_told_at_once():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"process 0 cannot listen on port {port}"):
            join(Membership(f"localhost:{port}", 1, 0, "a test"))
