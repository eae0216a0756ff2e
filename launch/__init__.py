"""Where ranks run: in this process, on Ray, or under somebody else's launcher."""

import moetrain  # noqa: F401 - before torch: it decides how a process's threads wait
