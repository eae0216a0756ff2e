"""The error for a place without shards: names those that are nearby, or says how to make them."""

import os
from itertools import chain, count
from pathlib import Path

from data_pipeline.commands.shell import shell_command, text_setting
from data_pipeline.corpora.corpus_files import is_shard_folder, is_text
from data_pipeline.corpora.text_files import is_hidden
from data_pipeline.settings import DataError, DataSettings, resolved_dir

_BUILD = ("python", "-m", "data_pipeline.build")


def no_shards(where: str) -> str:
    """The message for a path or URL without shards."""
    complaint = f"{where} is not a shard folder (data.dir): "
    path = Path(where)
    if shards := _shards_in(path):
        more = f" ({len(shards) - 1} more are there)" if len(shards) > 1 else ""
        return f"{complaint}there is one in it: {text_setting('data.dir', str(shards[0]))}{more}"
    if is_text(path) and (command := _build_command(path)):
        to, words = command
        return (
            f"{complaint}it holds no shards; if it is text, give {text_setting('data.dir', to)} "
            f"once they are made, by: {words}"
        )
    words = shell_command([*_BUILD, "corpus=stdlib", "tokenizer=bytes", "to=FOLDER"])
    return f"{complaint}{_what_is_at(where)}; make one with '{words}'"


def _what_is_at(where: str) -> str:
    if "://" in where:
        return "there is no index.json in it, or no such folder"
    path = Path(where)
    if path.is_symlink() and not path.exists():
        return f"it is a link to {os.readlink(path)}, which isn't there"
    if not path.is_dir():
        return "there is no such folder"
    is_empty = all(is_hidden(name) for name in os.listdir(path))
    return "nothing is in it" if is_empty else "shards are in it, and no index.json of them"


def _shards_in(path: Path) -> list[Path]:
    try:
        return [folder for folder in sorted(path.iterdir()) if is_shard_folder(folder)]
    except OSError:
        return []


def _build_command(path: Path) -> tuple[str, str] | None:
    """A free folder, and the command that builds it from the text at a path; None if unnamed."""
    try:
        to = resolved_dir(DataSettings(corpus=str(path)))
    except DataError:  # nothing in its name is valid for a source
        return None
    places = chain([to], (f"{to}-{number}" for number in count(2)))
    free = os.path.relpath(next(place for place in places if not os.path.exists(place)))
    words = [
        text_setting("corpus", str(path)),
        "tokenizer=bytes",
        text_setting("to", free),
    ]
    return free, " ".join([*_BUILD, *words])
