"""The scripts parse, point to what exists, and pass their arguments on."""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dsjax.__main__ import _check_flags, _parser, _split_overrides
from dsjax.config import Config, load
from dsjax.training.cluster import find

SCRIPTS = [
    "launch/install.sh",
    "launch/quickstart.sh",
    "launch/simulate.sh",
    "launch/processes.sh",
    "launch/fp8_experiment.sh",
    "launch/r1_tiny.sh",
    "launch/slurm.sbatch",
    "launch/tpu_vm.sh",
    "launch/xpk.sh",
    "tests/run.sh",
    ".ci/run",
]
NO_COMMANDS = ("launch/install.sh", "launch/slurm.sbatch", "tests/run.sh", ".ci/run")  # they take no --help
FAKE_DSJAX = """#!/usr/bin/env bash
printf '%s\\n' "$0 $*" >> "$CALLS"
case $1 in
    train) echo "what came out" ;;
    generate) echo "a sample" ;;
esac
"""


@pytest.fixture
def sandbox(repository, tmp_path):
    """A copy of the scripts whose environment is installed already and whose `dsjax` writes down how it was called."""
    root = tmp_path / "copy"
    for name in ("launch", "tests"):
        shutil.copytree(repository / name, root / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(repository / name, root / name)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "dsjax").write_text(FAKE_DSJAX)
    (programs / "dsjax").chmod(0o755)
    for name in ("python", "pip"):
        (programs / name).symlink_to(shutil.which("python3"))
    stamp = (root / "setup.cfg").read_text() + (root / "pyproject.toml").read_text()
    for extra in ("plots", "plots,tokenizer", "tpu,tokenizer,plots"):
        (root / ".venv" / f"installed-{extra}").write_text(stamp)
    return root


def inherited() -> dict[str, str]:
    """The caller's environment without what steers the scripts."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHON", "DSJAX_VENV")}


def run(sandbox, script, *arguments, cwd="/", **environment):
    environment = {**inherited(), "CALLS": str(sandbox / "calls"), **environment}
    command = ["bash", str(sandbox / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def calls(sandbox) -> list[str]:
    return [line.partition("bin/dsjax ")[2] for line in (sandbox / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_stops_at_the_first_error(repository, script):
    subprocess.run(["bash", "-n", repository / script], check=True)
    if script != "launch/install.sh":  # sourced by the others
        text = (repository / script).read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
        assert os.access(repository / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_names_files_that_exist(repository, script):
    for name in re.findall(r"(?:configs|launch|tests)/\w+\.(?:py|sh|sbatch|yaml)", (repository / script).read_text()):
        assert (repository / name).exists(), name


def test_sbatch_directives_come_before_the_first_command(repository):
    lines = (repository / "launch" / "slurm.sbatch").read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands)
    for number in directives:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[number])


def test_simulate_passes_its_arguments_on(sandbox):
    ran = run(sandbox, "launch/simulate.sh", "4", "configs/tiny.py", "--config.training.total_steps=2")
    assert ran.returncode == 0, ran.stderr
    expected = "train --config configs/tiny.py --devices 4 --workdir runs/tiny-on-4 --config.training.total_steps=2"
    assert calls(sandbox) == [expected]


def test_simulate_finds_a_config_where_the_caller_stands(sandbox, tmp_path):
    folder = tmp_path / "my.pytorch"
    folder.mkdir()
    (folder / "mine.py").write_text("")
    ran = run(sandbox, "launch/simulate.sh", "2", "mine.py:form", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert calls(sandbox) == [f"train --config {folder}/mine.py:form --devices 2 --workdir runs/mine-form-on-2"]


def test_simulate_without_arguments_tells_its_usage(sandbox):
    ran = run(sandbox, "launch/simulate.sh")
    assert ran.returncode == 2 and "usage:" in ran.stderr


# One of several processes: tells its arguments, then does what $ACT says for its number.
FAKE_PROCESS = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
me=${*: -1}
trap 'echo "stopped $me" >> "$CALLS.signals"; exit 0' TERM
echo "out $me"
echo "error $me" >&2
eval "${ACT:-}"
"""
WAIT = "touch $CALLS.started$me; for ((i = 0; i < 200; i++)); do sleep 0.1; done"


@pytest.fixture
def processes(sandbox):
    """Starts processes.sh with stand-ins for dsjax that do `act`."""
    program = sandbox / ".venv" / "bin" / "dsjax"
    program.write_text(FAKE_PROCESS)

    def start(*arguments: str, act: str = "", cwd: Path | str = "/") -> subprocess.Popen:
        environment = {**inherited(), "CALLS": str(sandbox / "calls"), "ACT": act}
        command = ["bash", str(sandbox / "launch/processes.sh"), *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **streams)

    return start


def wait_for(paths: list[Path]) -> None:
    limit = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit, paths
        time.sleep(0.05)


def test_processes_print_the_first_one_and_the_errors_of_the_others(processes, sandbox):
    ran = processes("3", "--config", "configs/tiny.py", "--workdir", "a b")
    out, errors = ran.communicate(timeout=60)
    assert ran.returncode == 0
    assert out == "out 0\n"
    assert sorted(errors.splitlines()) == ["[1] error 1", "[2] error 2", "error 0"]
    told = sorted((sandbox / "calls").read_text().splitlines())
    port = re.search(r"127\.0\.0\.1:(\d+)", told[0])[1]
    shared = f"train --devices 1 --config configs/tiny.py --workdir a b --coordinator 127.0.0.1:{port} --processes 3"
    assert told == [f"{shared} --process {process}" for process in range(3)]


def test_processes_run_bench_too_and_take_more_devices(processes, sandbox):
    ran = processes("1", "bench", "--config", "x.py", "--devices", "2")
    ran.communicate(timeout=60)
    assert ran.returncode == 0
    assert (sandbox / "calls").read_text().startswith("bench --devices 1 --config x.py --devices 2 --coordinator ")


@pytest.mark.parametrize("failing", [0, 2])
def test_when_a_process_fails_all_end_with_its_exit_code(processes, sandbox, failing):
    start = time.monotonic()
    ran = processes("3", act=f"if [ $me = {failing} ]; then exit 7; fi; trap '' TERM; {WAIT}")
    _, errors = ran.communicate(timeout=60)  # which is to the end of all: they hold the pipe
    assert ran.returncode == 7 and time.monotonic() - start < 60
    assert "a process ended with exit code 7, and the others with it" in errors


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_reaches_every_process_as_sigterm(processes, sandbox, number, code):
    ran = processes("3", act=WAIT)
    wait_for([sandbox / f"calls.started{process}" for process in range(3)])
    ran.send_signal(number)
    ran.communicate(timeout=60)
    assert ran.returncode == code
    stopped = sorted((sandbox / "calls.signals").read_text().splitlines())
    assert stopped == ["stopped 0", "stopped 1", "stopped 2"]


def test_a_second_signal_ends_processes_that_do_not_listen(processes, sandbox):
    ran = processes("2", act=f"trap '' TERM; {WAIT}")
    wait_for([sandbox / f"calls.started{process}" for process in range(2)])
    ran.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert ran.poll() is None
    ran.send_signal(signal.SIGTERM)
    ran.communicate(timeout=60)
    assert ran.returncode == 143


@pytest.mark.parametrize("number", ["", "0", "x", "-1", "2x"])
def test_processes_want_a_number(sandbox, number):
    ran = run(sandbox, "launch/processes.sh", number)
    assert ran.returncode == 2 and "usage:" in ran.stderr


def test_quickstart_trains_and_tells_what_came_out(sandbox):
    ran = run(sandbox, "launch/quickstart.sh", "--config.training.seed=3")
    assert ran.returncode == 0, ran.stderr
    train, generate = calls(sandbox)
    assert train == "train --config configs/tiny.py --devices 8 --workdir runs/quickstart --config.training.seed=3"
    assert generate.startswith("generate --checkpoint runs/quickstart --prompt")
    assert ran.stdout == "what came out\nsample:\na sample\n"


def test_fp8_experiment_trains_bf16_first_and_compares_each_with_it(sandbox):
    ran = run(sandbox, "launch/fp8_experiment.sh", "mxfp8", "fp8_deepseek")
    assert ran.returncode == 0, ran.stderr
    learnt, *trained, report = calls(sandbox)
    assert learnt == "tokenizer --config configs/fp8_experiment.py"
    names = ["bf16", "mxfp8", "fp8_deepseek"]
    assert trained == [f"train --config configs/fp8_experiment.py:{name} --workdir runs/fp8/{name}" for name in names]
    assert report == "report runs/fp8/mxfp8 runs/fp8/fp8_deepseek --against runs/fp8/bf16 --out runs/fp8/report"


def stand_in(sandbox, name: str, body: str) -> None:
    """A program `name` that writes down its arguments, one call a line, and does `body`."""
    program = sandbox / ".venv" / "bin" / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "${{*//$\'\\n\'/ }}" >> "$CALLS.{name}"\n{body}\n')
    program.chmod(0o755)


def told(sandbox, name: str) -> list[str]:
    path = sandbox / f"calls.{name}"
    return path.read_text().splitlines() if path.exists() else []


def accepted(words: list[str]) -> Config:
    """The configuration that `dsjax WORDS` would run; an argument that it would refuse raises ConfigError."""
    words, overrides = _split_overrides(words)
    parser, commands = _parser()
    _check_flags(words, commands[words[0]])
    args, rest = parser.parse_known_args(words)
    assert rest == []
    return load(args.config, [one for one in overrides if not one.startswith("data.tokenizer=")])


DATA = "--config.data.sources=text_files:{0}/corpus --config.data.tokenizer={0}/tokenizer.json"


@pytest.fixture
def google(sandbox):
    """Runs a script with a stand-in for gcloud or xpk, which does `body`, in PATH."""

    def start(script: str, *arguments: str, program: str = "gcloud", body: str = "") -> subprocess.CompletedProcess:
        stand_in(sandbox, program, body)
        path = f"{sandbox / '.venv' / 'bin'}:{os.environ['PATH']}"
        return run(sandbox, script, *arguments, PATH=path)

    return start


def test_tpu_script_prepares_once_and_trains_on_every_host(google, sandbox, repository, monkeypatch):
    monkeypatch.chdir(repository)
    for step in ("create", "setup", "prepare", "train", "delete"):
        ran = google("launch/tpu_vm.sh", step, *(["--config.training.seed=3"] if step == "train" else []))
        assert ran.returncode == 0, ran.stderr
    create, copy, unpack, install, prepare, train, delete = told(sandbox, "gcloud")
    where = "compute tpus tpu-vm {} dsjax --zone=us-east5-a"
    assert create == where.format("create") + " --accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --spot"
    assert re.fullmatch(r"compute tpus tpu-vm scp \S+ dsjax:dsjax.tar.gz --zone=us-east5-a --worker=all", copy)
    assert unpack.startswith(where.format("ssh") + " --worker=all --command=mkdir -p dsjax && tar -xzf dsjax.tar.gz")
    assert (
        install == where.format("ssh") + " --worker=all --command=cd dsjax && . launch/install.sh tpu,tokenizer,plots"
    )
    assert prepare.startswith(
        where.format("ssh") + " --worker=0 --command=cd dsjax && .venv/bin/dsjax prepare --config "
    )
    assert train.startswith(
        where.format("ssh") + " --worker=all --command=cd dsjax && .venv/bin/dsjax train --distributed"
    )
    assert DATA.format("/mnt/shared") in prepare and DATA.format("/mnt/shared") in train
    assert delete == where.format("delete") + " --quiet"
    command = shlex.split(train.partition(".venv/bin/dsjax ")[2])
    assert accepted(command).training.seed == 3


def test_tpu_script_sends_what_is_needed_and_no_more(google, sandbox):
    (sandbox / ".git").mkdir()
    (sandbox / "runs").mkdir()
    ran = google("launch/tpu_vm.sh", "setup", body='[[ $4 == scp ]] && tar -tzf "$5" >> "$CALLS.archive"; true')
    assert ran.returncode == 0, ran.stderr
    names = told(sandbox, "archive")
    assert "./launch/install.sh" in names and "./setup.cfg" in names
    assert not [name for name in names if re.match(r"\./(\.git|\.venv|runs|\.cache)(/|$)", name)]


@pytest.mark.parametrize("code, runs", [(0, 1), (2, 1), (1, 21)])
def test_tpu_script_starts_a_failed_run_again_up_to_a_limit(google, sandbox, code, runs):
    ran = google("launch/tpu_vm.sh", "train", body=f'case "$*" in *"dsjax train --dist"*) exit {code} ;; esac')
    assert ran.returncode == code
    calls = told(sandbox, "gcloud")
    assert len([call for call in calls if "dsjax train --distributed" in call]) == runs
    assert len([call for call in calls if "pkill -KILL" in call]) == runs - 1


def test_xpk_script_creates_the_workload(google, sandbox, repository, monkeypatch):
    monkeypatch.chdir(repository)
    ran = google("launch/xpk.sh", "--config.training.seed=3", program="xpk")
    assert ran.returncode == 0, ran.stderr
    (call,) = told(sandbox, "xpk")
    options, _, command = call.partition(" --command=")
    assert options.startswith("workload create --workload=dsjax-v2-lite --cluster=my-cluster")
    for option in ("--tpu-type=v5p-128", "--num-slices=1", "--max-restarts=20", "--restart-on-exit-codes=1"):
        assert option in options.split()
    words = shlex.split(command)
    assert words[:3] == ["dsjax", "train", "--distributed"]
    assert accepted(words[1:]).training.seed == 3


def test_sbatch_prepares_in_one_task_and_trains_in_all(slurm, sandbox, repository, monkeypatch):
    monkeypatch.chdir(repository)
    ran = slurm("--config.training.seed=3")
    assert ran.returncode == 0, ran.stderr
    prepared, trained = calls(sandbox)
    assert prepared.startswith("prepare --config configs/") and trained.startswith("train --distributed --config")
    assert DATA.format("/shared") in prepared
    assert prepared.split("--config.data")[1:] == trained.split("--config.data")[1:]
    assert accepted(trained.split()).training.seed == 3
    first, second = told(sandbox, "srun")
    assert "--ntasks=1" in first and "--ntasks" not in second and "--kill-on-bad-exit=1" in second
    assert told(sandbox, "scontrol") == []


@pytest.fixture
def slurm(sandbox):
    """Runs slurm.sbatch with stand-ins for Slurm's programs; `act` is what srun does in place of training."""

    def start(*arguments: str, act: str = "", state: str = "RUNNING", **environment: str):
        skip = 'while [[ $1 == --* ]]; do shift; done; "$@"'
        stand_in(sandbox, "srun", f'{skip}\n[ "$2" = prepare ] || {{ {act or ":"}; }}')
        stand_in(sandbox, "scontrol", "")
        stand_in(sandbox, "squeue", f"echo {state}")
        job = {"SLURM_SUBMIT_DIR": str(sandbox), "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "7"}
        return run(sandbox, "launch/slurm.sbatch", *arguments, **(job | environment))

    return start


@pytest.mark.parametrize(
    "code, restarts, state, requeued",
    [
        (1, "", "RUNNING", True),
        (137, "19", "RUNNING", True),
        (1, "20", "RUNNING", False),
        (2, "", "RUNNING", False),
        (1, "", "COMPLETING", False),
        (0, "", "RUNNING", False),
    ],
)
def test_a_failed_job_queues_again_up_to_a_limit(slurm, sandbox, code, restarts, state, requeued):
    ran = slurm(act=f"exit {code}", state=state, SLURM_RESTART_COUNT=restarts)
    assert told(sandbox, "scontrol") == (["requeue 7"] if requeued else [])
    assert ran.returncode == (0 if requeued else code)


def test_a_job_whose_time_is_up_saves_and_queues_again(slurm, sandbox):
    # PPID is the batch script, which Slurm signals; the run ends by itself when srun has passed the signal on.
    act = "trap 'echo saved >> $CALLS.saved; exit 0' TERM; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done"
    ran = slurm(act=act)
    assert ran.returncode == 0, ran.stderr
    assert told(sandbox, "saved") == ["saved"]
    assert told(sandbox, "scontrol") == ["requeue 7"]


def test_jobset_runs_one_process_a_node_and_restarts(repository, monkeypatch):
    monkeypatch.chdir(repository)
    jobset = yaml.safe_load((repository / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    nodes = spec["parallelism"]
    assert (spec["completions"], environment["NNODES"]) == (nodes, str(nodes))
    name = jobset["metadata"]["name"]
    for index in range(nodes):
        found = find(environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert (found.processes, found.process) == (nodes, index)
        assert found.coordinator == f"{name}-{job['name']}-0-0.{name}:8476"
    accepted(container["command"][1:])
    assert container["command"][:3] == ["dsjax", "train", "--distributed"]
    # One failed pod fails its Job, which restarts the JobSet, but for a mistake of the user's.
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and spec["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True


def test_skypilot_task_joins_its_nodes_and_recovers(repository, sandbox, monkeypatch):
    monkeypatch.chdir(repository)
    task = yaml.safe_load((repository / "launch" / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1 and task["workdir"] == "."
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert set(task["file_mounts"]) == {"/shared"}
    for block in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[block]], check=True)
    ran = subprocess.run(
        ["bash", "-c", task["run"]], cwd=sandbox, env=inherited() | task["envs"] | {"CALLS": str(sandbox / "calls")}
    )
    assert ran.returncode == 0
    (call,) = calls(sandbox)
    assert call.startswith("train --distributed") and DATA.format("/shared") in call
    assert accepted(call.split()).data.directory == task["envs"]["PREPARED"]
    assert re.search(r"launch/install\.sh [\w,]+", task["setup"])


def test_the_image_holds_what_it_is_told_to_run(repository):
    lines = (repository / "launch" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"dsjax", "configs", "setup.cfg", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (repository / name).exists(), name
    extras = (repository / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    asked = re.findall(r"(?:EXTRAS=|install\.sh )([\w,]+)", "".join(path.read_text() for path in scripts(repository)))
    assert asked
    for extra in ",".join(asked).split(","):
        assert f"\n{extra} =" in extras, extra


def scripts(repository) -> list[Path]:
    return [path for path in (repository / "launch").iterdir() if path.is_file()]


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - set(NO_COMMANDS)))
def test_help_is_the_comment_at_the_head_of_the_script(sandbox, name):
    lines = (sandbox / name).read_text().splitlines()[1:]
    comment = [line.removeprefix("#").removeprefix(" ") for line in itertools.takewhile(lambda a: a[:1] == "#", lines)]
    for flag in ("-h", "--help"):
        ran = run(sandbox, name, flag)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.splitlines() == comment
        assert name in ran.stdout  # how to call it
    assert not (sandbox / "calls").exists()


def test_a_failed_installation_is_not_taken_for_done(sandbox):
    (sandbox / "setup.cfg").write_text("changed")
    for program in ("python", "pip"):
        (sandbox / ".venv" / "bin" / program).unlink()
        (sandbox / ".venv" / "bin" / program).write_text("#!/bin/sh\nexit 1\n")
        (sandbox / ".venv" / "bin" / program).chmod(0o755)
    before = (sandbox / ".venv" / "installed-plots").read_text()
    shell = ["bash", "-c", ". launch/install.sh plots"]
    assert subprocess.run(shell, cwd=sandbox, env=inherited(), capture_output=True, text=True).returncode == 1
    assert (sandbox / ".venv" / "installed-plots").read_text() == before


FAKE_PYTHON = """#!/bin/sh
# Makes an environment (-m venv DIR), and writes down what it is asked to install.
case $2 in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
    pip) echo "$0 in $PWD" >> "$CALLS" ;;
esac
"""


def test_a_copied_or_moved_checkout_gets_an_environment_of_its_own(sandbox, tmp_path):
    shutil.rmtree(sandbox / ".venv")
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def install(root: Path, **environment: str) -> list[str]:
        asked.write_text("")
        shell = ["bash", "-c", "set -euo pipefail; . launch/install.sh plots"]
        steers = {"PYTHON": str(python), "CALLS": str(asked), **environment}
        subprocess.run(shell, cwd=root, env=inherited() | steers, check=True, capture_output=True)
        return asked.read_text().splitlines()

    assert install(sandbox) == [f"{sandbox}/.venv/bin/python in {sandbox}"]
    assert install(sandbox) == []
    copy = tmp_path / "another copy"
    shutil.copytree(sandbox, copy)
    assert install(copy) == [f"{copy}/.venv/bin/python in {copy}"]
    assert install(copy) == install(sandbox) == []
    (tmp_path / "link").symlink_to(copy)
    assert install(tmp_path / "link") == []
    # One environment for both: it runs the code of the one that came last.
    shared = {"DSJAX_VENV": f"{sandbox}/.venv"}
    assert install(copy, **shared) == [f"{sandbox}/.venv/bin/python in {copy}"]
    assert install(sandbox) == [f"{sandbox}/.venv/bin/python in {sandbox}"]


def test_unsuitable_python_is_refused_in_a_sentence(sandbox, tmp_path):
    shutil.rmtree(sandbox / ".venv")
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ran = run(sandbox, "launch/quickstart.sh", PYTHON=str(old))
    assert ran.returncode == 2
    assert ran.stderr == f"dsjax: {old} is not Python 3.11, 3.12 or 3.13; name one with PYTHON=...\n"


def test_the_tiny_r1_goes_through_all_stages(sandbox):
    facts = sandbox / "runs" / "r1_tiny" / "facts.txt"
    facts.parent.mkdir(parents=True)
    facts.write_text("1+1=2\n")
    done = run(sandbox, "launch/r1_tiny.sh", "--config.training.total_steps=3")
    assert done.returncode == 0, done.stderr
    made = calls(sandbox)
    assert [call.split()[0] for call in made] == [
        *("train", "collect", "sft", "grpo", "collect", "sft", "grpo", "distill", "grpo"),
        *("eval",) * 6,
    ]
    parser, commands = _parser()
    for call in made:
        words, overrides = _split_overrides(call.split())
        _check_flags(words, commands[words[0]])
        args = parser.parse_args(words)
        assert (overrides != []) == (args.config == "configs/r1_tiny.py:rl" and words[0] == "grpo")
