"""`moetrain VERB …`: one command for all of it; without a verb it trains."""

import runpy
import sys

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.exit_codes import BAD_CONFIGURATION
from moetrain.verbs import TRAIN, VERBS, no_verb, overview, verb_of


def main() -> None:
    """The console script."""
    ignore_broken_pipes()
    words = sys.argv[1:]
    if words in (["--help"], ["-h"], ["help"]):
        print(overview())
        return
    if mistake := no_verb(words):
        print(f"moetrain: {mistake}", file=sys.stderr)
        raise SystemExit(BAD_CONFIGURATION)
    verb, rest = verb_of(words) or (TRAIN, words)
    sys.argv[1:] = rest
    runpy.run_module(VERBS[verb].module, run_name="__main__")


if __name__ == "__main__":
    main()
