"""Warm-up, stable, decay: the learning rate of a run whose length is not known when it starts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by step.

    The rate climbs to `peak` over `warmup_steps` and stays there until `decay` is called; then it falls linearly to
    `peak * floor` over the steps that were asked for, and the run ends.
    """

    peak: float
    warmup_steps: int
    floor: float = 0.02
    decay_start: int | None = None
    decay_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """Rate of step `step` (from 0)."""
        rate = self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_start is None or step < self.decay_start:
            return rate
        progress = min(1.0, (step - self.decay_start + 1) / self.decay_steps)
        return rate * (1.0 - (1.0 - self.floor) * progress)

    @property
    def end(self) -> int | None:
        """Number of steps of the whole run; None while no decay has been asked for."""
        return None if self.decay_start is None else self.decay_start + self.decay_steps
