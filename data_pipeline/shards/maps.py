"""Memory-mapped shards: as many as the process may have open; the others are reopened when needed.

Owns the bound and the order in which maps are released. Leaves the files to `storage` and the
meaning of their bytes to `reader`.
"""

import mmap
import resource
import threading
from pathlib import Path

from data_pipeline.shards.index import ShardEntry
from data_pipeline.storage import ShardFiles

# Linux's default, used if the value can't be read.
_MAX_MAP_COUNT = 65530


class ShardMaps:
    """Maps of a folder's shards, `most` of them at a time; thread-safe.

    A released map stays mapped while somebody holds the view that they got: nobody should hold more
    than `at_once`.
    """

    def __init__(self, files: ShardFiles, *, most: int, at_once: int) -> None:
        self.at_once = at_once
        self._most = most
        self._files = files
        self._maps: dict[str, memoryview] = {}
        self._lock = threading.Lock()

    def bytes_of(self, shard: ShardEntry) -> memoryview:
        """The bytes of a shard's file; the least recently used maps are released."""
        with self._lock:
            found = self._maps.pop(shard.file, None)
            if found is None:
                if len(self._maps) >= self._most:
                    del self._maps[next(iter(self._maps))]
                with self._files.open(shard.file, size=shard.size, sha256=shard.sha256) as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if hasattr(mapped, "madvise"):
                    # Documents are read in random order: what the system would read around each
                    # of them, and keep, is a hundred times as much and of no use.
                    mapped.madvise(mmap.MADV_RANDOM)
                found = memoryview(mapped)
            self._maps[shard.file] = found
            return found


def num_mappable(wanted: int) -> int:
    """How many files this process may keep mapped; raises the soft limit if `wanted` exceeds it.

    A map takes an open file and one of the kernel's maps. Half of both is left for other uses.
    """
    most = _max_map_count() // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * min(wanted, most)
    if soft != resource.RLIM_INFINITY and needed > soft:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (ValueError, OSError):  # a system with limits of its own, such as macOS
            pass
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // 2))


def _max_map_count() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return _MAX_MAP_COUNT
