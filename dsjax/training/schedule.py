"""What changes as tokens go by: batch size, learning rate, bias speed, MTP weight [V3 §4.2].

Everything is counted in sequences seen, an exact integer: with the batch ramp, steps are uneven, and V3's 14.8T tokens
and its 244,108 steps leave no room for rounding. Pure Python.
"""

import bisect
import math
from typing import NamedTuple

from dsjax.config import OptimizerConfig, TrainingConfig


class Stretch(NamedTuple):
    """Consecutive steps of one batch size."""

    step: int  # steps done when it begins
    sequences: int  # sequences seen when it begins
    batch_size: int


class Schedule:
    """The schedules of one run; every method takes the sequences seen before the step in question.

    Phases of `OptimizerConfig` and `TrainingConfig` are lengths in tokens. Rates that move within a step take their
    value at the step's end, so that the first step of a warmup learns something and the last step of a cosine reaches
    its floor; switches (MTP weight, bias speed, batch size) are decided by the step's first token.
    """

    def __init__(self, training: TrainingConfig, optimizer: OptimizerConfig, sequence_length: int):
        self._training = training
        self._optimizer = optimizer
        self._sequence_length = sequence_length
        self._microbatch = training.sequences_per_microbatch
        self._stretches = self._plan_ramp()
        self._end_tokens = self.total_sequences(training.total_steps) * sequence_length

    def batch_size(self, sequences_seen: int) -> int:
        """Sequences of the next step: a multiple of the microbatch size, growing linearly with tokens over the ramp."""
        training = self._training
        start = training.initial_batch_size
        if start is None or sequences_seen * self._sequence_length >= training.batch_ramp_tokens:
            return training.batch_size
        grown = (training.batch_size - start) * sequences_seen * self._sequence_length // training.batch_ramp_tokens
        return (start + grown) // self._microbatch * self._microbatch

    def hyperparameters(self, sequences_seen: int) -> dict[str, float]:
        """`learning_rate`, `bias_update_speed` and `mtp_loss_weight` of the next step."""
        training = self._training
        tokens = sequences_seen * self._sequence_length
        tokens_after = tokens + self.batch_size(sequences_seen) * self._sequence_length
        bias_is_frozen = training.bias_update_tokens is not None and tokens >= training.bias_update_tokens
        mtp_weight = training.mtp_loss_weight
        if training.mtp_loss_weight_final is not None and tokens >= (training.mtp_switch_tokens or 0):
            mtp_weight = training.mtp_loss_weight_final
        return {
            "learning_rate": self._learning_rate(tokens_after),
            "bias_update_speed": 0.0 if bias_is_frozen else training.bias_update_speed,
            "mtp_loss_weight": mtp_weight,
        }

    def total_sequences(self, total_steps: int) -> int:
        """Sequences seen after `total_steps` steps."""
        after = bisect.bisect_right(self._stretches, total_steps, key=lambda stretch: stretch.step)
        stretch = self._stretches[after - 1]
        return stretch.sequences + (total_steps - stretch.step) * stretch.batch_size

    def remaining(self, sequences_seen: int) -> int:
        """Tokens left until the run's last step."""
        return max(0, self._end_tokens - sequences_seen * self._sequence_length)

    def _plan_ramp(self) -> list[Stretch]:
        """One stretch per batch size: at most (batch_size - initial_batch_size) / microbatch_size + 1 of them."""
        stretches = [Stretch(0, 0, self.batch_size(0))]
        while stretches[-1].batch_size < self._training.batch_size:
            last = stretches[-1]
            steps = _ceil_div(self._growth_sequence(last.batch_size) - last.sequences, last.batch_size)
            sequences = last.sequences + steps * last.batch_size
            stretches.append(Stretch(last.step + steps, sequences, self.batch_size(sequences)))
        return stretches

    def _growth_sequence(self, batch_size: int) -> int:
        """The smallest number of sequences seen at which the batch is larger than `batch_size`."""
        training = self._training
        start = training.initial_batch_size or training.batch_size
        growth = batch_size + self._microbatch - start
        return _ceil_div(growth * training.batch_ramp_tokens, (training.batch_size - start) * self._sequence_length)

    def _learning_rate(self, tokens: int) -> float:
        optimizer = self._optimizer
        peak, floor = optimizer.learning_rate, optimizer.decay_learning_rate
        if tokens < optimizer.warmup_tokens:
            return peak * (tokens / optimizer.warmup_tokens)
        decay_start = optimizer.warmup_tokens + optimizer.constant_tokens
        if tokens <= decay_start:
            return peak
        decay_tokens = optimizer.decay_tokens
        if decay_tokens is None:
            decay_tokens = max(1, self._end_tokens - decay_start)
        if tokens < decay_start + decay_tokens:
            progress = (tokens - decay_start) / decay_tokens
            return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        hold_ends = optimizer.hold_tokens is not None and tokens > decay_start + decay_tokens + optimizer.hold_tokens
        return optimizer.final_learning_rate if hold_ends and optimizer.final_learning_rate is not None else floor


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
