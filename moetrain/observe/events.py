"""events.jsonl: what happened to a run, when and why.

Owns one line for each start, save, failure, restart and stop. The driver and the ranks all append
to the same file. Leaves it to whoever meets an event to name it and give its reason.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moetrain.observe.json_lines import append_line, read_lines
from moetrain.redaction import redacted

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events from any number of processes on one machine, whole lines only."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def write(self, kind: str, *, reason: str | None = None, **fields: Any) -> None:
        """Append `{"time", "event", "reason", **fields}`, without the secrets in them.

        Never raises for the disk's sake: an event is often written while something worse is being
        handled, and a full disk must not hide that.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": time, "event": kind, "reason": reason} | fields
        try:
            append_line(self.path, redacted(record))
        except OSError as error:
            logger.warning("event %r not recorded: %s", kind, error)


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """All events in the order in which they were written."""
    return [record for _, record in read_lines(Path(path))]
