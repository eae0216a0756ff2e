"""The verbs of `moetrain`: which module each is, and what it does in a line."""

from typing import NamedTuple

from moetrain.checks import nearest


class Verb(NamedTuple):
    """One thing that the command does."""

    module: str
    """What `python -m` runs for it."""
    does: str


TRAIN = "train"

VERBS = {
    TRAIN: Verb("moetrain.train_command", "train a model; the verb may be left out"),
    "data build": Verb("data_pipeline.build", "turn text into shards of tokens"),
    "data inspect": Verb("data_pipeline.inspect", "show and check what is in a folder of shards"),
    "verify": Verb("moetrain.verify", "check that layouts of a configuration train alike"),
    "report": Verb("moetrain.report", "write the report of a run"),
    "compare": Verb("moetrain.compare", "compare runs: arms, their seeds, and the noise"),
    "checkpoint": Verb("moetrain.checkpoint", "check every byte of a run's checkpoints"),
    "branch": Verb("moetrain.branch", "make a new run from a checkpoint of another"),
    "export": Verb("moetrain.export", "make a Hugging Face model of a run"),
    "import": Verb("moetrain.import_hf", "make a run of a Hugging Face model"),
    "upcycle": Verb("moetrain.upcycle", "make a Mixture-of-Experts run of a dense one"),
    "doctor": Verb("moetrain.doctor", "find out what this machine can train with"),
    "simulate": Verb("launch.simulate", "estimate the cost of failures on a cluster"),
    "submit": Verb("launch.submit", "train as a job of a Ray cluster"),
    "completion": Verb("moetrain.completion", "print a shell's completion: bash or zsh"),
}


def verb_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Returns the verb that a command line begins with, and the other words; None without one."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in VERBS:
            return name, words[length:]
    return None


def no_verb(words: list[str]) -> str | None:
    """Returns what to say of a first word that is neither a verb nor anything of training's."""
    if not words or "=" in words[0] or words[0].startswith(("-", "+", "~")) or verb_of(words):
        return None
    close = nearest(" ".join(words[:2]), VERBS) or nearest(words[0], VERBS)
    return f"{words[0]}: there is no such verb{close}; there are {', '.join(VERBS)}"


def overview() -> str:
    """Returns a line for each verb."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.does}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: moetrain [VERB] [key=value …]",
            "",
            *lines,
            "",
            "`moetrain VERB --help` shows a verb's settings, `moetrain --version` the version.",
        ]
    )
