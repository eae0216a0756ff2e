"""A mistake in the code: a small exact replacement in one file, and what is expected to see it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("moetrain", "launch", "data_pipeline", "conf", "tests", "examples", "docs", "benchmarks")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake. `right` occurs once in the file; in its place comes `wrong`."""

    name: str
    file: str
    right: str
    wrong: str
    test: str
    """The test of the suite that sees it."""
    verify: bool = False
    """Whether `moetrain verify` is asked too: not about what it doesn't run by its nature."""

    def require_anchor(self, root: Path = ROOT) -> str:
        """Returns the file's text; raises ValueError unless `right` is there exactly once."""
        text = (root / self.file).read_text()
        if (found := text.count(self.right)) != 1:
            raise ValueError(f"{self.name}: {self.file} has its anchor {found} times, not once")
        return text

    def make(self, root: Path) -> None:
        """Puts the mistake into a copy of the source tree."""
        text = self.require_anchor(root)
        (root / self.file).write_text(text.replace(self.right, self.wrong))

    def undo(self, root: Path) -> None:
        """Puts the right file back into a copy."""
        shutil.copyfile(ROOT / self.file, root / self.file)


def copy_sources(to: Path) -> Path:
    """Copies what runs and its tests into a folder, and returns it."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copyfile(ROOT / name, to / name)
    return to
