"""A custom data source: documents that aren't in any file.

`moetrain data build corpus=squares corpus_options.count=200 tokenizer=bytes to=data/squares
extensions=[examples.squares_data_source]` builds shards; `moetrain +model=toy data.corpus=squares
extensions=[examples.squares_data_source]` builds them and trains.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from moetrain import api
from moetrain import extensions as ext


@dataclass
class SquaresOptions:
    """`corpus_options.…`, or `data.corpus_options.…` of a run."""

    count: int = 400


@ext.register_data_source("squares", options=SquaresOptions)
class Squares(ext.DataSource):
    """Sentences about numbers. Rows of a database would be read in the same way."""

    def version(self) -> str:
        """Returns a version that changes with the text: here that of this code."""
        return "1"

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields each document's location and text; always the same ones in the same order."""
        for number in range(self.options.count):
            text = " ".join(f"{n} squared is {n * n}." for n in range(number, number + 50))
            yield f"from {number}", text


def main() -> None:
    """Builds the shards and trains on them for some steps."""
    config = api.compose("+model=toy", "data.corpus=squares", *sys.argv[1:])
    with api.training(config) as training:
        for batch in training.batches():
            print(f"step {training.num_steps}  loss {training.step(batch).loss:.4f}")


if __name__ == "__main__":
    main()
