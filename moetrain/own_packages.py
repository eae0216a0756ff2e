"""Finds this project's other packages beside this one, whatever else on the path has their names.

`launch` and `data_pipeline` are names that a user's folder may have too: a `launch.py`, ROS's
package `launch`.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = ("data_pipeline", "launch")
ROOT = Path(__file__).resolve().parents[1]


class _Beside:
    """Finds the packages in the folder that has this one."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


def find_own_packages() -> None:
    """Makes this process find them; raises ImportError where it has imported others already."""
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        if loaded is not None and not _is_own(name, getattr(loaded, "__file__", None)):
            raise ImportError(
                f"moetrain needs its own package {name}, and this process has imported "
                f"{getattr(loaded, '__file__', None) or loaded} under that name: import moetrain "
                "before it, or rename it"
            )
    if not any(isinstance(finder, type(_FINDER)) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FINDER)


def are_shadowed() -> bool:
    """Returns whether a process that is started here would find other packages by the names."""
    places = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = [(name, PathFinder.find_spec(name, [p])) for name in PACKAGES for p in places if p]
    return any(spec is not None and not _is_own(name, spec.origin) for name, spec in found)


def _is_own(name: str, file: str | None) -> bool:
    return file is not None and Path(file).resolve() == ROOT / name / "__init__.py"


_FINDER = _Beside()
