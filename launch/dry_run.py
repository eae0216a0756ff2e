"""`dry_run=true`: makes the checks of a start and says what would be trained; writes nothing.

Begins nothing of a run: no folder, no lock, no shards, no rank, no Ray of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline import DataSettings, PlannedBuild
from data_pipeline.quantities import count, decimal_size
from launch.folders import require_folder
from launch.plan import Plan
from launch.run_lock import require_free
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.remote.folder import require_mounted
from moetrain.checkpoint.remote.of_run import newest_manifest_there
from moetrain.checkpoint.trained import newest_manifest
from moetrain.settings import Resolved
from moetrain.train.prepare import Prepared, rehearse
from moetrain.train.preview import Preview, preview_of
from moetrain.train.resume import is_complete, require_done_alike, what_is_complete


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would be, checked as far as a start would check it."""

    config: Resolved
    newest: Manifest | None
    """The step of the checkpoint from which it would resume."""
    is_elsewhere: bool
    """Whether that checkpoint would have to be downloaded first."""
    found: Prepared | PlannedBuild
    """Its shards, or the build of missing ones."""

    @property
    def preview(self) -> Preview:
        """What it would train."""
        return preview_of(self.config)

    @property
    def is_complete(self) -> bool:
        """Whether the run has all its steps already."""
        return self.newest is not None and is_complete(self.config, self.newest)

    def lines(self) -> Iterator[str]:
        """Yields the lines to print."""
        if isinstance(self.found, Prepared):
            yield from self.found.lines()
        else:
            yield from self.preview.lines()
            corpus, since = self.found.corpus, self.found.change
            yield (
                f"source {corpus.description}: {count(self.preview.tokens)} tokens; its shards "
                f"would be built first, in {self.found.settings.to}, of about "
                f"{decimal_size(corpus.num_bytes)} of text"
                f"{f', which has changed since it was built ({since})' if since else ''}"
            )
        yield f"run: {self.config.run_dir}, {self._beginning()}"

    @property
    def state(self) -> str:
        """Returns the run's progress in a few words."""
        if self.newest is None:
            return "new"
        return "done" if self.is_complete else f"at step {self.newest.step}"

    def _beginning(self) -> str:
        if self.newest is None:
            return "a new one"
        fetched = f", fetched from {self.config.checkpoint.upload_to}" if self.is_elsewhere else ""
        if self.is_complete:
            return f"which {what_is_complete(self.config, step=self.newest.step)}{fetched}"
        return f"which would resume from step {self.newest.step}{fetched}"


def dry_run(config: Resolved, plan: Plan, *, data: DataSettings) -> int:
    """Prints what a resolved configuration would train; returns the exit code.

    Raises what a start would: ConfigError or DataError for bad input.
    """
    if plan.external and plan.external.rank > 0:
        return 0  # only the first rank checks, as at a start
    rehearsal = prepare_dry_run(config, data=data)
    for line in rehearsal.lines():
        print(line)
    is_complete = rehearsal.is_complete
    what = "this run is complete: nothing would be trained" if is_complete else "this could start"
    print(f"dry run: {what}; nothing was written")
    return 0


def prepare_dry_run(config: Resolved, *, data: DataSettings) -> DryRun:
    """Returns what a run would be; raises ConfigError or DataError where it could not start."""
    run_dir = config.run_dir
    require_free(run_dir)
    require_folder(run_dir)
    require_mounted(config.checkpoint)
    newest, is_elsewhere = newest_manifest(run_dir), False
    there = newest_manifest_there(config.checkpoint, run=config.run.name)
    if there and (newest is None or there.step > newest.step):
        newest, is_elsewhere = there, True
    found = rehearse(config, data, newest=newest)
    if newest:
        require_done_alike(config, newest)
    return DryRun(config=config, newest=newest, is_elsewhere=is_elsewhere, found=found)
