"""Runs the passes: the float64 reference, the layout of one rank, then every other layout."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipeline import Batch
from moetrain.verify.absolute import run_reference
from moetrain.verify.layouts import REFERENCE, Layout
from moetrain.verify.passes import DTYPE, LAYOUTS, Pass, Plan
from moetrain.verify.ranks import RankFailed, run_ranks
from moetrain.verify.result import PassResult, Result
from moetrain.verify.settings import VerifySettings
from moetrain.verify.trial import Trial, run_trial, write_batches

Say = Callable[[str], None]


def run_passes(
    plan: Plan, batches: list[Batch], *, settings: VerifySettings, say: Say
) -> list[PassResult]:
    """Returns the results of all passes."""
    with tempfile.TemporaryDirectory(
        prefix="moetrain-verify-", ignore_cleanup_errors=True
    ) as folder:
        write_batches(Path(folder), batches)
        run = _Run(plan, settings, folder=Path(folder), say=say)
        return [run.of(part) for part in plan.passes]


class _Run:
    def __init__(self, plan: Plan, settings: VerifySettings, *, folder: Path, say: Say) -> None:
        self._plan, self._settings, self._folder, self._say = plan, settings, folder, say
        self._number = 0
        self._total = sum(len(part.layouts) for part in plan.passes)
        self._exact: dict[str, Path] = {}  # the reference's records, by pass
        cores = len(os.sched_getaffinity(0))
        self._cores = cores
        # As many in every layout: with a thread for each core, one rank alone would spend its time
        # waiting for a core that something else is busy on.
        self._threads = max(1, cores // settings.num_ranks)

    def of(self, part: Pass) -> PassResult:
        """Runs one pass."""
        error = None if self._plan.reference_refuses else self._reference(part)
        exact = self._exact.get(part.name)
        first = self._records(part, "first")
        results: list[Result] = []
        for layout in part.layouts:
            is_first = not results
            trial = Trial(
                config=layout.of(part.config),
                batches=self._folder,
                rates=part.rates,
                # The first one is compared with exact numbers, of the same bound.
                tolerances=part.tolerances if is_first else part.tolerances_of(layout),
                tie_tolerance=part.tolerances.forward,
                against=exact if is_first else first,
                records=first if is_first else None,
                one_by_one=(exact or first) if part.step_by_step else None,
                skipped_step=part.skipped_step,
                timeout_seconds=self._settings.timeout_seconds,
            )
            results.append(self._layout(part, layout, trial))
            if is_first and results[0].error:
                break  # there is nothing to compare with
        return PassResult(part=part, results=tuple(results), exact=exact is not None, error=error)

    def _reference(self, part: Pass) -> str | None:
        """Runs the float64 reference of a pass; returns why it failed."""
        if part.name == DTYPE:  # its one step is the first of the layouts
            if LAYOUTS in self._exact:
                self._exact[DTYPE] = self._exact[LAYOUTS]
            return None
        folder = self._records(part, "exact")
        trial = Trial(
            config=REFERENCE.of(part.config),
            batches=self._folder,
            rates=part.reference_rates,
            tolerances=part.tolerances,
            tie_tolerance=part.tolerances.forward,
            against=None,
            records=folder,
            one_by_one=folder if part.step_by_step else None,
            skipped_step=part.skipped_step,
            timeout_seconds=self._settings.timeout_seconds,
        )
        head, started = f"{part.name}: float64 reference", time.monotonic()
        self._say(head)
        try:
            run_ranks(
                run_reference,
                trial,
                num_ranks=1,
                num_threads=self._cores,
                timeout_seconds=self._settings.timeout_seconds,
                on_step=lambda step: self._say(f"{head}: step {step + 1} of {len(part.rates)}"),
            )
        except RankFailed as error:
            return f"float64 reference: {error}"
        self._exact[part.name] = folder
        self._say(f"{head}: {time.monotonic() - started:.1f} s\n")
        return None

    def _layout(self, part: Pass, layout: Layout, trial: Trial) -> Result:
        self._number += 1
        head = f"[{self._number}/{self._total}] {part.name}: {layout}"
        self._say(head)
        started = time.monotonic()
        try:
            ranks = run_ranks(
                run_trial,
                trial,
                num_ranks=layout.num_ranks,
                num_threads=self._threads,
                timeout_seconds=self._settings.timeout_seconds,
                on_step=lambda step: self._say(f"{head}: step {step + 1} of {len(part.rates)}"),
            )
            result = Result(layout=layout, ranks=tuple(ranks))
        except RankFailed as error:
            result = Result(layout=layout, error=str(error))
        result = replace(result, seconds=time.monotonic() - started)
        self._say(f"{head}: {'agrees' if result.passed else 'FAILS'}, {result.seconds:.1f} s\n")
        return result

    def _records(self, part: Pass, name: str) -> Path:
        folder = self._folder / part.name.replace(" ", "_") / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
