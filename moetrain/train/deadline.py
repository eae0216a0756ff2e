"""Which step ends a run: the last of `train.num_steps`, or one after `train.max_seconds`."""

import time

from moetrain.settings.resolved import ResolvedTrain


class Deadline:
    """Which step of an attempt is the run's last.

    Time counts on one rank, from the first step of an attempt on and added to that of the
    checkpoint; the ranks agree on it before each step.
    """

    def __init__(self, settings: ResolvedTrain, *, seconds: float, leads: bool) -> None:
        """`seconds` are those of the checkpoint; `leads` says whether this rank's clock counts."""
        self._max_seconds, self._leads = settings.max_seconds, leads
        self._before, self._begun = seconds, time.monotonic()
        self._ended: float | None = None
        self.last_step = settings.num_steps

    def begin(self) -> None:
        """Begins to count, before the first step of an attempt."""
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds in this run's attempts; 0 where nothing depends on them.

        So the checkpoints of runs of so many steps don't depend on the machine's speed.
        """
        if self._max_seconds is None:
            return 0.0
        return self._ended or self._before + time.monotonic() - self._begun

    @property
    def is_over(self) -> bool:
        """Whether the time is over, by this rank's clock."""
        return self._leads and self._max_seconds is not None and self.seconds >= self._max_seconds

    def end_with(self, step: int) -> None:
        """Makes a step the last one, as all ranks have agreed before it; its time doesn't count.

        So a run that gets more time has what it is given from here on, whatever the last validation
        took.
        """
        self._ended = self.seconds
        self.last_step = min(step, self.last_step)
