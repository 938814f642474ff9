"""Joining a cluster: how many processes train together, which of them this one is, and where they meet.

`find` reads it from three flags, or from what Slurm, SkyPilot, Kubernetes and TPU slices put into the environment;
`join` brings the processes together; `leave` ends one that failed without waiting for the others.
"""

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import jax

from dsjax.sections import ConfigError

PORT = 8476  # where processes meet, unless something says otherwise
SLURM_PORTS = range(61440, 65536)  # above the ports that Linux hands out; chosen by job, so that jobs can share a node
JOIN_SECONDS = 300.0
GRACE_SECONDS = 1.0  # the others die when process 0 is gone: time for them to tell what happened to them
THREE_FLAGS = "--coordinator HOST:PORT, --processes N and --process I"

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Membership:
    """The place of this process among those that train together."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int  # from 0
    source: str  # what said so
    local_devices: tuple[int, ...] | None = None  # which GPUs of the host are this process's; None: all it sees


def find(
    environment: Environment,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Membership | None:
    """The place of this process, by the three flags, else by the variables of an engine.

    None: nothing in `environment` tells, and JAX may find out by asking (Open MPI, the metadata of a TPU VM).

    Raises:
      ConfigError: some of the flags are missing; no engine's variables are complete; two engines contradict each other;
        a value is not possible.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in flags.items() if value is None]
    if not missing:
        return _membership("the command line", str(coordinator), "--processes", processes, "--process", process)
    if len(missing) < len(flags):
        raise ConfigError(f"{' and '.join(missing)} missing: give {THREE_FLAGS} together, or --distributed instead")
    found: list[Membership] = []
    problems: list[ConfigError] = []
    for engine in ENGINES:
        try:
            one = engine(environment)
        except ConfigError as error:
            problems.append(error)
        else:
            found += [one] if one else []
    if not found and problems:
        raise problems[0]
    for other in found[1:]:
        if (other.processes, other.process) != (found[0].processes, found[0].process):
            raise ConfigError(
                f"{_told(found[0])}, but {_told(other)}; say which with {THREE_FLAGS} in place of --distributed"
            )
    return found[0] if found else None


def _told(one: Membership) -> str:
    return f"by {one.source} this is process {one.process} of {one.processes}"


def _skypilot(environment: Environment) -> Membership | None:
    """One process a node, with all of its GPUs."""
    values = _variables("SkyPilot", environment, ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"))
    if values is None:
        return None
    ips, rank = values
    hosts = ips.split()
    name = "the lines of SKYPILOT_NODE_IPS"
    return _membership("SkyPilot", f"{_bracketed(hosts[0])}:{PORT}", name, len(hosts), "SKYPILOT_NODE_RANK", rank)


def _tpu(environment: Environment) -> Membership | None:
    """One process a host; of several slices, the hosts of the first come first, as libtpu counts them."""
    values = _variables("a TPU slice", environment, ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"))
    if values is None:
        return None
    hosts = values[0].split(",")
    worker = _whole("TPU_WORKER_ID", values[1])
    names = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
    megascale = _variables("several TPU slices", environment, names) or ("1", "0", hosts[0])
    slices, index = _whole(names[0], megascale[0]), _whole(names[1], megascale[1])
    _check_index("TPU_WORKER_ID", worker, "the names in TPU_WORKER_HOSTNAMES", len(hosts))
    _check_index(names[1], index, names[0], slices)
    return Membership(
        _with_port(megascale[2].partition(":")[0]), slices * len(hosts), index * len(hosts) + worker, "a TPU slice"
    )


def _kubernetes(environment: Environment) -> Membership | None:
    """One process a pod of an indexed Job; the address and number of pods are in launch/gke_jobset.yaml."""
    if not environment.get("JAX_COORDINATOR_ADDRESS") and not environment.get("JOB_COMPLETION_INDEX"):
        return None
    index = "JOB_COMPLETION_INDEX" if environment.get("JOB_COMPLETION_INDEX") else "NODE_RANK"
    values = _variables("Kubernetes", environment, ("JAX_COORDINATOR_ADDRESS", "NNODES", index))
    assert values is not None
    if environment.get("NODE_RANK", values[2]) != values[2]:
        raise ConfigError(f"{index} is {values[2]}, but NODE_RANK is {environment['NODE_RANK']}; set one of them only")
    address = _with_port(values[0], environment.get("JAX_COORDINATOR_PORT") or PORT)
    return _membership("Kubernetes", address, "NNODES", values[1], index, values[2])


def _slurm(environment: Environment) -> Membership | None:
    """One process a task of a job step."""
    if not environment.get("SLURM_JOB_ID"):
        return None
    number = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", number, "SLURM_PROCID")
    values = _variables("Slurm", environment, names, "; start the command with srun")
    assert values is not None
    job, nodes, tasks, task = values
    seed = _whole("SLURM_JOB_ID", job) + _whole("SLURM_STEP_ID", environment.get("SLURM_STEP_ID") or "0")
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])  # node[07-15,31] is node07
    address = f"{first}:{SLURM_PORTS[seed % len(SLURM_PORTS)]}"
    return _membership("Slurm", address, number, tasks, "SLURM_PROCID", task, _gpus_of_task(environment))


def _gpus_of_task(environment: Environment) -> tuple[int, ...] | None:
    """Of the GPUs that a Slurm task sees, its own: a share, or None for all where it is alone or bound to some."""
    local = environment.get("SLURM_LOCALID")
    spans = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # as in 8(x3),4
    numbers = [int(tasks) for tasks, nodes in spans for _ in range(int(nodes or 1))]
    if local is None or max(numbers, default=0) < 2:
        return None
    visible = [one for one in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    here = _whole("SLURM_GPUS_ON_NODE", environment.get("SLURM_GPUS_ON_NODE") or str(len(visible)))
    if environment.get("SLURM_GPUS_PER_TASK") or len(visible) < here:
        return None
    node = _whole("SLURM_NODEID", environment.get("SLURM_NODEID") or "0")
    tasks = numbers[min(node, len(numbers) - 1)]
    if here % tasks:
        raise ConfigError(
            f"{here} GPUs of this node cannot be divided over its {tasks} tasks; make --ntasks-per-node 1 or {here}"
        )
    share, index = here // tasks, _whole("SLURM_LOCALID", local)
    return tuple(range(index * share, (index + 1) * share)) or None


ENGINES: tuple[Callable[[Environment], Membership | None], ...] = (_skypilot, _tpu, _kubernetes, _slurm)


def _variables(
    engine: str, environment: Environment, names: tuple[str, ...], remedy: str = ""
) -> tuple[str, ...] | None:
    """The values of all `names`; None where there is none of them.

    Raises:
      ConfigError: there are some of them.
    """
    values = tuple(environment.get(name, "").strip() for name in names)
    if not any(values):
        return None
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if missing:
        given = [name for name in names if name not in missing]
        raise ConfigError(
            f"this looks like {engine} ({', '.join(given)}), but {' and '.join(missing)} missing{remedy or ''};"
            f" or give {THREE_FLAGS}"
        )
    return values


def _membership(
    source: str,
    address: str,
    processes_name: str,
    processes: object,
    process_name: str,
    process: object,
    local_devices: tuple[int, ...] | None = None,
) -> Membership:
    """What was found, checked; the names are those that the user knows."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"the coordinator's address {address!r} (by {source}) must be HOST:PORT, as in node1:{PORT}")
    total, index = _whole(processes_name, processes), _whole(process_name, process)
    _check_index(process_name, index, processes_name, total)
    return Membership(address, total, index, source, local_devices)


def _whole(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number") from error


def _check_index(name: str, index: int, total_name: str, total: int) -> None:
    if total < 1:
        raise ConfigError(f"{total_name} is {total}, but must be at least 1")
    if not 0 <= index < total:
        raise ConfigError(f"{name} is {index}, but {total_name} makes {total}: it must be from 0 to {total - 1}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host  # IPv6


def _with_port(address: str, port: object = PORT) -> str:
    return address if re.search(r"[^:]:\d+$", address) else f"{_bracketed(address)}:{port}"


def join(member: Membership | None, timeout: float = JOIN_SECONDS) -> None:
    """Waits until all processes are there; before JAX is first used.

    After `timeout` seconds it ends the process with exit code 1 and one sentence: JAX itself would abort it. From here
    on an uncaught exception ends the process at once, see `leave`.

    Raises:
      ConfigError: there is no cluster, or the coordinator's port is taken.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    watch = threading.Timer(timeout, _give_up, (member, timeout))
    watch.daemon = True
    watch.start()
    later = int(timeout) + 60
    try:
        if member is None:
            jax.distributed.initialize(initialization_timeout=later)
        else:
            _check_port(member)
            jax.distributed.initialize(
                member.coordinator,
                member.processes,
                member.process,
                list(member.local_devices) if member.local_devices else None,
                cluster_detection_method="deactivate",
                initialization_timeout=later,
            )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        hint = f"see launch/ for examples, or give {THREE_FLAGS}"
        raise ConfigError(f"--distributed found no cluster to join ({reason}); {hint}") from error
    finally:
        watch.cancel()
    sys.excepthook = _tell_and_leave
    if member is not None and member.process == 0:
        _keep_stdout()
        said = f"{member.processes} processes, by {member.source}; coordinator {member.coordinator}"
        print(said, file=sys.stderr, flush=True)


def _keep_stdout() -> None:
    """Python alone prints to standard output from now on: gloo tells there who is connected, and JSON may follow."""
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(descriptor, "w", errors="replace", buffering=1)


def _check_port(member: Membership) -> None:
    """Raises ConfigError where process 0 could not listen; JAX dies of it on some versions."""
    if member.process:
        return
    port = int(member.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} ({error.strerror}); end what uses it, such as a process left"
                f" over from the last run, or choose another with {THREE_FLAGS}"
            ) from error


def _give_up(member: Membership | None, timeout: float) -> None:
    if member is None:
        told = f"no cluster answered within {timeout:g} s; give {THREE_FLAGS}"
    elif member.process == 0 or _answers(member.coordinator):
        told = (
            f"not all {member.processes} processes came together at {member.coordinator} within {timeout:g} s"
            f" ({member.source}); look for those that failed or were never started"
        )
    else:
        told = (
            f"process {member.process} of {member.processes} found no coordinator at {member.coordinator} within"
            f" {timeout:g} s ({member.source}); check that process 0 runs there and that this host reaches the port"
        )
    sys.stderr.write(f"dsjax: {told}\n")
    _end(1)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except OSError:
        return False


def has_joined() -> bool:
    """Whether this process is one of several that were brought together."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that tells and writes."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """Ends a process that has joined at once: an orderly end would wait for the others, and they for this one."""
    if is_first():
        time.sleep(GRACE_SECONDS)
    _end(code)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell_and_leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    leave(1)
