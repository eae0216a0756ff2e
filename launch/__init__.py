"""Where ranks run: in this process, on Ray, or under another launcher."""

import moetrain  # noqa: F401 - before torch: it decides how a process's threads wait
