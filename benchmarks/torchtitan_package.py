"""torchtitan, installed for comparison into a folder of its own."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TORCHTITAN = "0.3.0"
# Its MoE needs only these; its other requirements (data sets, logging) are not used.
TORCHTITAN_NEEDS = ("spmd_types==0.2.3", "einops", "tyro", "docstring_parser", "typeguard")
PEERS_DIR = Path(os.path.expanduser("~/.cache/moetrain/benchmarks"))


class Unavailable(Exception):
    """An implementation that can't run here, with the reason."""


def install_torchtitan() -> Path:
    """Installs torchtitan and what its MoE imports into a folder of its own; returns the folder.

    moetrain's environment doesn't change: the folder comes last on the path, and only here. Raises
    Unavailable if pip can't install it.
    """
    folder = PEERS_DIR / f"torchtitan-{TORCHTITAN}-torch-{torch.__version__}"
    if (folder / "torchtitan").is_dir():
        return folder
    wanted = [f"torchtitan=={TORCHTITAN}", *TORCHTITAN_NEEDS]
    if importlib.util.find_spec("triton") is None:  # it is imported, but never run on CPU
        wanted.append("triton")
    partial = folder.with_name(f".{folder.name}.installing")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    result = subprocess.run(
        [*command, "--target", str(partial), *wanted], capture_output=True, text=True
    )
    if result.returncode:
        raise Unavailable(f"pip could not install {wanted[0]}: {result.stderr.strip()[-300:]}")
    partial.rename(folder)
    return folder


def import_peer(module: str) -> Any:
    """Returns a module of torchtitan's, installed the first time."""
    folder = str(install_torchtitan())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it replaces nothing in moetrain's environment
    return importlib.import_module(module)
