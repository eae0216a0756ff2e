"""The table of presets: `python -m benchmarks.presets` prints it as Markdown."""

import yaml

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain.command import config_dir
from moetrain.model import active_parameters, total_parameters
from moetrain.settings import ModelSettings


def main() -> None:
    """Prints a row for each preset, smallest first: name, parameters, active ones, purpose."""
    presets = {p.stem: p.read_text() for p in (config_dir() / "model").glob("*.yaml")}
    settings = {name: ModelSettings(**yaml.safe_load(text)) for name, text in presets.items()}
    for name in sorted(settings, key=lambda n: total_parameters(settings[n])):
        comment = [line[2:] for line in presets[name].splitlines() if line.startswith("# ")]
        purpose = " ".join(comment).split(". ")[0].rstrip(".").split(": ")[0]
        total, active = total_parameters(settings[name]), active_parameters(settings[name])
        print(f"| `{name}` | {_short(total)} | {_short(active)} | {purpose} |")


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


if __name__ == "__main__":
    ignore_broken_pipes()
    main()
