"""The collectives that this process has begun and not finished, by torch's flight recorder.

Torch records the last ones of every process group (`TORCH_FR_BUFFER_SIZE`), with gloo and with
NCCL. The functions that read them have no public name yet; this is the only file that uses them.
"""

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch._C import _distributed_c10d

_READERS = ("_dump_nccl_trace", "_dump_fr_trace")  # of NCCL's groups, where built in; of the others


def unfinished_collectives() -> list[str]:
    """Returns a line for each collective in flight, and one for how far each group has come."""
    return [line for name in _READERS for line in _lines(_record(name))]


def _record(reader: str) -> Mapping[str, Any]:
    read = getattr(_distributed_c10d, reader, None)
    if read is None:
        return {}
    # Of this process's own memory.
    found = pickle.loads(read(includeCollectives=True, includeStackTraces=False, onlyActive=False))
    return found if isinstance(found, dict) else {}


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    entries = record.get("entries") or []
    names = {str(entry["pg_id"]): entry["process_group"][1] for entry in entries}
    for group, status in sorted((record.get("pg_status") or {}).items()):
        begun, done = status["last_enqueued_collective"], status["last_completed_collective"]
        if begun > 0 and begun != done:
            name = names.get(group, "unnamed")
            yield f"group {group} ({name}): {begun} collectives begun, {done} done"
    for entry in entries:
        if entry["retired"] or entry["state"] == "completed":
            continue
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        yield (
            f"{entry['profiling_name']} (number {number} of group {entry['pg_id']}, "
            f"{entry['process_group'][1]}): {entry['state']}, {entry['input_sizes']} → "
            f"{entry['output_sizes']}"
        )
