"""Reinforcement learning: rollouts by the engine, rewards, and steps of GRPO, on one mesh and one set of weights.

A run stands between two rollouts: there it is saved, and from there it goes on bit for bit, since problems follow from
their index and every sample's randomness from its problem's. What a rollout was worth is in metrics.jsonl.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.config import Config, ConfigError
from dsjax.data import tokenizer as tokenizers
from dsjax.data.chat import Template, find_template
from dsjax.inference.engine import Engine
from dsjax.inference.prefix import PrefixCache
from dsjax.planning import layout
from dsjax.planning.roofline import without_mtp
from dsjax.posttraining.evaluation import measure_accuracy
from dsjax.posttraining.grpo import Experience, advantages, grpo_loss
from dsjax.posttraining.rewards import Judge, Judged, make_judge
from dsjax.posttraining.rollouts import Sample, as_batch, draw_samples, lay_out, make_scorer
from dsjax.posttraining.tasks import Problem, Task, make_task
from dsjax.sharding import check_batch, check_nodes, make_mesh
from dsjax.training import checkpoint
from dsjax.training.divergence import Halt, Watch
from dsjax.training.interrupt import EXIT_CODES, Interrupt
from dsjax.training.lock import lock
from dsjax.training.loop import is_due
from dsjax.training.machine import machine, use_compile_cache
from dsjax.training.monitor import Monitor, Step, dollars, duration, read_rows
from dsjax.training.resume import Position, Start, describe, find_start, keep_tokenizer
from dsjax.training.schedule import Schedule
from dsjax.training.start import begin
from dsjax.training.state import TrainState, abstract_state, build_network
from dsjax.training.step import make_train_step
from dsjax.training.summary import DIVERGED, Summary, draw, introduce
from dsjax.training.watchdog import Watchdog
from dsjax.training.workdir import CHECKPOINTS, METRICS, claim, find_tokenizer, has_checkpoint, write_config


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState(TrainState):
    """What a checkpoint of such a run holds: a TrainState, and the reference policy's (params, router_bias)."""

    reference: Any  # None where the objective has no KL term


@dataclass(frozen=True)
class Run:
    """What every rollout of a run needs, and none changes."""

    config: Config
    task: Task
    template: Template | None
    mesh: Mesh
    schedule: Schedule
    judge: Judge
    engine: Engine
    score: Callable[..., Any]  # rollouts.make_scorer
    train_step: Callable[..., Any]
    saver: checkpoint.Saver
    monitor: Monitor
    interrupt: Interrupt
    watchdog: Watchdog


class Stopped(Exception):
    """Asked to stop while samples are drawn: nothing is lost but these."""


def reinforce(config: Config, workdir: str | Path, allow_change: Sequence[str] = ()) -> Summary:
    """Trains by rewards until `config.training.total_steps`, from the newest checkpoint in `workdir` if there is one.

    `allow_change` as of `training.loop.train`. The first SIGINT or SIGTERM stops the drawing of samples, or finishes
    the steps of a rollout, saves and returns; a second one ends the process.

    Raises:
      ConfigError: `workdir` holds something else, or a run that cannot go on under this config; the task, the weights
        to begin with or the mesh cannot be used.
    """
    workdir = Path(workdir)
    use_compile_cache(config.monitor.compile_cache)
    with contextlib.ExitStack() as stack:
        mesh = make_mesh(layout.resolve(config, jax.device_count()).mesh)
        check_fit(config, mesh)
        tokenizer, text = load_tokenizer(config, workdir)
        task = make_task(config.task, config.training.seed)
        judge = stack.enter_context(make_judge(config.task, task))
        claim(workdir)
        stack.enter_context(lock(workdir))
        interrupt = stack.enter_context(Interrupt())
        start = find_start(config, workdir, task.fingerprint, allow_change)
        position = start.position
        if position.step >= config.training.total_steps:
            return already_complete(workdir, start)
        check_rollouts(config, position)
        write_config(workdir, config)
        keep_tokenizer(workdir, config.data.tokenizer, position.step)

        keep = config.checkpoint
        saver = checkpoint.Saver(workdir / CHECKPOINTS, keep.keep_last, keep.keep_every, keep.keep_best)
        watchdog = Watchdog(config.monitor.watchdog_seconds)
        state = load_policy(config, mesh, workdir, position)
        chips = machine(config.hardware, config.precision)
        monitor = Monitor(without_mtp(config), workdir, chips, None, position.step)  # which is not computed here
        stack.enter_context(contextlib.closing(monitor))
        introduce(monitor, config, mesh, workdir, start)
        net = build_network(config, mesh)
        engine = Engine(
            config,
            state.params,
            state.router_bias,
            mesh,
            slots=config.grpo.slots,
            tokenizer=text,
            prefix_cache=PrefixCache(),
            tells_routes=config.grpo.keep_routes,
        )
        run = Run(
            config=config,
            task=task,
            template=find_template(tokenizer),
            mesh=mesh,
            schedule=Schedule(config.training, config.optimizer, config.data.sequence_length),
            judge=judge,
            engine=engine,
            score=make_scorer(config, net, mesh),
            train_step=make_train_step(grpo_loss(net, config), config, mesh),
            saver=saver,
            monitor=monitor,
            interrupt=interrupt,
            watchdog=watchdog,
        )
        interrupt.has_begun = True
        stack.enter_context(watchdog)
        position, halted = to_the_end(run, state, start)
        monitor.warn(saver.finish())
    return conclude(config, workdir, position, halted, monitor, interrupt)


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless batches fit the mesh and each other."""
    training, grpo = config.training, config.grpo
    if jax.process_count() > 1:
        raise ConfigError("dsjax grpo runs in one process, with all devices that it sees; start one")
    check_nodes(config.dispatch.ranks_per_node, mesh)
    check_batch("training.microbatch_size", training.sequences_per_microbatch, mesh)
    for name, size, of in (
        ("training.batch_size", training.batch_size, ("grpo.group_size", grpo.group_size)),
        ("training.total_steps", training.total_steps, ("grpo.minibatches", grpo.minibatches)),
        ("checkpoint.every_steps", config.checkpoint.every_steps, ("grpo.minibatches", grpo.minibatches)),
        ("evaluation.every_steps", config.evaluation.every_steps, ("grpo.minibatches", grpo.minibatches)),
        ("grpo.reference_every_steps", grpo.reference_every_steps, ("grpo.minibatches", grpo.minibatches)),
    ):
        if size is not None and size % of[1]:
            raise ConfigError(f"{name} is {size}, but must be a multiple of {of[0]} = {of[1]}")
    for name, value in (
        ("training.initial_batch_size", training.initial_batch_size),
        ("monitor.quantisation_every_steps", config.monitor.quantisation_every_steps),
        ("monitor.device_check_every_steps", config.monitor.device_check_every_steps),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if value is not None:
            raise ConfigError(f"{name} is {value}, but dsjax grpo has no such thing; set it to None")


def load_tokenizer(config: Config, workdir: Path) -> tuple[str, tokenizers.Tokenizer]:
    """(its name, the tokenizer): the run's own copy where it goes on. Raises ConfigError for one of too many tokens."""
    name = find_tokenizer(workdir, config.data.tokenizer) if has_checkpoint(workdir) else config.data.tokenizer
    text = tokenizers.load(name)
    if text.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {name!r} has {text.vocab_size} tokens, but model.vocab_size is"
            f" {config.model.vocab_size}; give the one that the weights were trained with"
        )
    return name, text


def check_rollouts(config: Config, position: Position) -> None:
    """Raises ConfigError unless a rollout begins at `position`: from elsewhere no rollout ends where a run saves."""
    each, step = config.grpo.minibatches, position.step
    if step % each:
        raise ConfigError(
            f"grpo.minibatches is {each}, but rollouts of so many steps do not meet step {step}, where this run goes"
            f" on; set it to a divisor of {step}"
        )


def load_policy(config: Config, mesh: Mesh, workdir: Path, position: Position) -> PolicyState:
    """The state at `position`; at the beginning the policy is its own reference."""
    has_reference = config.grpo.kl_coefficient > 0
    if position.step == 0:
        state = begin(config, mesh)
        return with_reference(state, copy_of(state) if has_reference else None)
    plain = abstract_state(config, mesh)
    target = with_reference(plain, (plain.params, plain.router_bias) if has_reference else None)
    return checkpoint.restore(workdir / CHECKPOINTS, position.step, target, verify=False)


def with_reference(state: TrainState, reference: Any) -> PolicyState:
    return PolicyState(state.params, state.router_bias, state.opt_state, state.step, reference)


def copy_of(state: TrainState) -> Any:
    """The policy's weights in arrays of their own: those of the state are given away at the next step."""
    return jax.tree.map(jnp.copy, (state.params, state.router_bias))


def to_the_end(run: Run, policy: PolicyState, start: Start) -> tuple[Position, str | None]:
    """Rollout after rollout, from `start`; (where the run has come to, why it must not go on)."""
    config, position = run.config, start.position
    # A leap of this loss means nothing; that too many updates are left out does.
    watch = Watch(dataclasses.replace(config.divergence, spike_std=None), start.losses)
    reference = policy.reference
    state = TrainState(policy.params, policy.router_bias, policy.opt_state, policy.step)
    del policy
    saved = position.step

    def save() -> None:
        run.watchdog.beat()
        meta = describe(config, position, watch.losses, run.task.fingerprint, run.monitor)
        run.monitor.warn(run.saver.save(with_reference(state, reference), meta))

    try:
        if position.step == 0:
            # The row of a step says how good the policy is after it; this is before the first one.
            accuracy = validate(run, state)
            run.monitor.say(f"before the first step: {accuracy_line(accuracy)}")
        while position.step < config.training.total_steps:
            state, position = one_rollout(run, state, reference, position, watch)
            if config.grpo.kl_coefficient and is_due(position.step, config.grpo.reference_every_steps):
                reference = copy_of(state)
            stop = run.interrupt.requested is not None
            if (
                stop
                or position.step == config.training.total_steps
                or is_due(position.step, config.checkpoint.every_steps)
            ):
                save()
                saved = position.step
            if stop:
                break
    except Stopped:
        if position.step > saved:
            save()
    except Halt as halt:
        return position, f"{halt}; the run ends here"
    return position, None


def one_rollout(
    run: Run, state: TrainState, reference: Any, position: Position, watch: Watch
) -> tuple[TrainState, Position]:
    """Draws samples, judges them, and takes the steps of one rollout; the state and where it stands."""
    config, monitor, started = run.config, run.monitor, time.monotonic()
    grpo = config.grpo
    questions = config.training.batch_size // grpo.group_size  # of each step
    first = position.step * questions
    problems = [(index, run.task.problem(index)) for index in range(first, first + questions * grpo.minibatches)]
    samples = sample(run, state, problems)
    drawn = time.monotonic()
    judged = run.judge(
        [one.problem.prompt for one in samples],
        [one.text for one in samples],
        [one.problem.answer for one in samples],
        run.watchdog.beat,
    )
    if judged.failed:
        monitor.warn(f"{judged.failed} rewards could not be computed and count as 0 ({'; '.join(judged.reasons)})")
    groups = [advantages(judged.total[i : i + grpo.group_size]) for i in range(0, len(samples), grpo.group_size)]
    advantage = np.concatenate([of_group for of_group, _ in groups])
    seconds = {"rollout_seconds": drawn - started, "reward_seconds": time.monotonic() - drawn}

    minibatches: list[tuple[Experience, dict[str, Any]]] = []
    begun = time.monotonic()
    for number in range(grpo.minibatches):
        part = range(number * config.training.batch_size, (number + 1) * config.training.batch_size)
        experience, gap = gain_experience(run, state, reference, [samples[i] for i in part], advantage[part])
        minibatches.append((experience, told_of(samples, judged, groups, part, config) | {"log_prob_gap": gap}))
        run.watchdog.beat()
    seconds["scoring_seconds"] = time.monotonic() - begun
    # Drawing and scoring were for all steps of the rollout; its first row has their time.
    rate = sum(len(one.tokens) for one in samples) / seconds["rollout_seconds"]
    minibatches[0][1].update(seconds | {"rollout_tokens_per_second": rate})

    monitor.restart_clock()
    for experience, told in minibatches:
        state, position, row = one_step(run, state, position, experience, told)
        if position.step == config.training.total_steps or is_due(position.step, config.evaluation.every_steps):
            row |= validate(run, state)
            monitor.restart_clock()
        monitor.write(row)
        watch.judge(row)
        run.watchdog.beat()
    return state, position


def sample(run: Run, state: TrainState, problems: Sequence[tuple[int, Problem]]) -> list[Sample]:
    """The group of every problem, by the weights as they are. Raises Stopped."""

    def on_result() -> None:
        run.watchdog.beat()
        if run.interrupt.requested is not None:
            raise Stopped

    run.engine.update(state.params, state.router_bias)
    try:
        return draw_samples(
            run.engine, run.config, run.template, problems, run.config.grpo.group_size, "train", on_result
        )
    finally:
        run.engine.release()


def validate(run: Run, state: TrainState) -> dict[str, float]:
    """Accuracy on the held-out problems, as fields of a row of metrics.jsonl."""
    config = run.config
    run.engine.update(state.params, state.router_bias)
    try:
        found = measure_accuracy(
            run.engine,
            config,
            run.task,
            run.template,
            config.evaluation.sequences,
            config.grpo.validation_samples,
            run.watchdog.beat,
        )
    finally:
        run.engine.release()
    row = {"validation_accuracy": found.pass_at_1}
    return row | ({"validation_majority": found.majority} if config.grpo.validation_samples > 1 else {})


def accuracy_line(row: Mapping[str, Any]) -> str:
    line = f"accuracy on held-out problems {row['validation_accuracy']:.1%}"
    majority = row.get("validation_majority")
    return line if majority is None else f"{line}, by majority {majority:.1%}"


def gain_experience(
    run: Run, state: TrainState, reference: Any, samples: Sequence[Sample], advantage: np.ndarray
) -> tuple[Experience, float]:
    """The samples in rows with all that the objective asks of them, and how far the trainer's log-probabilities are
    from the rollout's at the worst token."""
    grpo = run.config.grpo
    assert run.engine.tokenizer is not None
    rows = lay_out(samples, run.config.data.sequence_length, run.engine.tokenizer.eos_id)
    drawn = rows.spread([one.log_probs for one in samples])
    policy = (state.params, state.router_bias, rows.marked_BT, rows.routes_BTLK)
    old, kept = run.score(*policy, grpo.keep_sampling_mask)
    # Within the mask log-probabilities are others than the rollout's, which are of the whole vocabulary.
    whole = old if kept is None else run.score(*policy)[0]
    behind = np.zeros_like(old) if reference is None else run.score(*reference, rows.marked_BT, kept_BTW=kept)[0]
    old = drawn if grpo.old_log_probs == "rollout" else old
    gap = float(np.max(np.abs(whole - drawn)))
    return Experience(rows.marked_BT, rows.spread(advantage), old, behind, kept, rows.routes_BTLK), gap


def told_of(
    samples: Sequence[Sample],
    judged: Judged,
    groups: Sequence[tuple[np.ndarray, bool]],
    part: range,
    config: Config,
) -> dict[str, Any]:
    """What the samples of one step are like, as fields of its row."""
    size = config.grpo.group_size
    mean = lambda values: float(np.mean([values[i] for i in part]))  # noqa: E731
    return {
        "reward": mean(judged.total),
        **{f"reward_{name}": mean(values) for name, values in judged.parts.items()},
        "response_length": mean([len(one.tokens) for one in samples]),
        "truncated_fraction": mean([one.is_truncated for one in samples]),
        "zero_variance_groups": sum(not differs for _, differs in groups[part.start // size : part.stop // size]),
        "reward_failures": judged.failed,
    }


def one_step(
    run: Run, state: TrainState, position: Position, experience: Experience, told: Mapping[str, Any]
) -> tuple[TrainState, Position, dict[str, Any]]:
    """The step after `position`: the state, where it stands, and its row."""
    config = run.config
    batch, microbatches = as_batch(experience, config, run.mesh)
    schedule = run.schedule.hyperparameters(position.step * config.training.batch_size)
    # No bias_update_speed: loads count rows' empty ends, whose tokens are all alike.
    settings = {"learning_rate": schedule["learning_rate"]}
    values = {name: np.float32(value) for name, value in settings.items()}
    state, metrics = run.train_step(state, batch, np.int32(microbatches), values)
    position = Position(position.step + 1, position.sequences + len(experience.rows_BT))
    step = Step(position.step, position.sequences, len(experience.rows_BT), settings, metrics | told)
    return state, position, run.monitor.measure(step)


def already_complete(workdir: Path, start: Start) -> Summary:
    """Says that there is nothing to do, and what came out."""
    position = start.position
    meta = checkpoint.read_meta(workdir / CHECKPOINTS, position.step)
    print(
        f"the run in {workdir} is complete: it has {position.step} steps; for more, raise "
        f"--config.training.total_steps above {position.step}"
    )
    measured = [row for row in read_rows(workdir / METRICS) if row.get("validation_accuracy") is not None]
    if measured:
        print(f"{accuracy_line(measured[-1])}, cost {dollars(meta['cost_usd'])}")
    return Summary(position.step, meta["tokens"], None, None, meta["seconds"], meta["cost_usd"], 0)


def conclude(
    config: Config, workdir: Path, position: Position, halted: str | None, monitor: Monitor, interrupt: Interrupt
) -> Summary:
    """Draws the plots, says what came out and how to go on."""
    cost, tokens = monitor.cost(), position.sequences * config.data.sequence_length
    is_complete = position.step == config.training.total_steps and not halted
    saved = checkpoint.steps(workdir / CHECKPOINTS)
    rows = read_rows(workdir / METRICS)
    lines = [
        f"{position.step} of {config.training.total_steps} steps in {duration(monitor.seconds)}, cost {cost}",
        bill(rows, monitor),
        f"checkpoints: {workdir / CHECKPOINTS} ({', '.join(map(str, saved)) or 'none'})",
    ]
    measured = [row for row in rows if row.get("validation_accuracy") is not None]
    if measured:
        lines.insert(1, accuracy_line(measured[-1]))
    if is_complete:
        lines.append(draw(workdir))
    else:
        lines.append(f"stopped: {halted}" if halted else "interrupted; the same command goes on from here")
    for line in lines:
        monitor.say(line)
    exit_code = DIVERGED if halted else 0
    if not halted and position.step and position.step not in saved:
        exit_code = 1
    elif not halted and not is_complete and interrupt.requested:
        exit_code = EXIT_CODES[interrupt.requested]
    return Summary(position.step, tokens, None, None, monitor.seconds, monitor.cost_usd, exit_code)


def bill(rows: Sequence[Mapping[str, Any]], monitor: Monitor) -> str:
    """Where the time and the money of a run went."""
    parts = {
        "rollouts": sum(row.get("rollout_seconds") or 0 for row in rows),
        "rewards": sum(row.get("reward_seconds") or 0 for row in rows),
        "scoring": sum(row.get("scoring_seconds") or 0 for row in rows),
        "updates": sum(row["step_seconds"] for row in rows),
    }
    rate = monitor.cost_usd / monitor.seconds if monitor.seconds else 0.0
    rest = max(0.0, monitor.seconds - sum(parts.values()))
    told = [f"{name} {duration(seconds)} ({dollars(rate * seconds)})" for name, seconds in parts.items()]
    return f"of it {', '.join(told)}, validation and the rest {duration(rest)} ({dollars(rate * rest)})"
