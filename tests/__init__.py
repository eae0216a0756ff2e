import moetrain  # noqa: F401 - before torch, as commands and ranks have it
