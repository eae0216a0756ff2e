"""The comparison with which a sweep ends. Nothing in it can fail the sweep."""

import sys
from pathlib import Path

from moetrain.checks import ConfigError
from moetrain.redaction import redacted_text


def compare_sweep(folder: Path) -> str | None:
    """Writes the comparison of a sweep's runs into its folder; returns what is to be printed of it.

    None where fewer than two of them have finished, or something prevented it, which is said.
    """
    # matplotlib takes a second to import, which a sweep's start doesn't wait for.
    from moetrain.compare.comparison import compare_runs
    from moetrain.compare.page import write_page
    from moetrain.compare.tables import write_tables
    from moetrain.compare.text import as_text, noise_notes

    try:
        comparison = compare_runs([str(folder)])
        results = comparison.main.results
        if sum(len(result.values) for result in results) < 2:
            return None
        path = write_page(comparison, folder)
        list(write_tables(comparison, folder, records=False))
        if max(result.estimate.n for result in results) < 2:  # the sweep's own table says the rest
            text = "compared  " + next(noise_notes(comparison))
        else:
            text = as_text(comparison)
        return f"{redacted_text(text)}\n\ncompared  {path}"
    except ConfigError:
        return None  # none has finished, as the table says
    except Exception as error:
        print(f"moetrain: no comparison: {type(error).__name__}: {error}", file=sys.stderr)
        return None
