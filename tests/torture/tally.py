"""The results of the cases, counted, and their table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

TERMS = """\
- **detected**: an event or an error names the corruption, and what was loaded instead is bit for
  bit what had been saved.
- **survived**: there was nothing to detect; what was loaded is the newest, bit for bit.
- **lost**: something that was saved, and is not itself corrupted, can't be loaded any more; or an
  attempt failed that should have continued.
- **silent**: something else was loaded than what had been saved, and nothing said so.
"""


@dataclass
class Tally:
    """The outcomes of the cases of one kind."""

    name: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """How often what was hit; for people to see that a case did what it says."""
    problems: list[str] = field(default_factory=list)
    """What was lost or silent, in words."""
    skipped: str | None = None
    """Why this kind could not be tested here."""

    def add(self, outcome: str, *, note: str | None = None, problem: str = "") -> None:
        """Counts a case: detected, survived, lost or silent."""
        assert outcome in ("detected", "survived", "lost", "silent"), outcome
        self.tried += 1
        self.outcomes[outcome] += 1
        if note:
            self.notes[note] += 1
        if outcome in ("lost", "silent"):
            self.problems.append(f"{self.name}: {outcome}: {note or ''}: {problem}")

    @property
    def bad(self) -> int:
        """How many were lost or silent."""
        return self.outcomes["lost"] + self.outcomes["silent"]


def table(tallies: Sequence[Tally]) -> str:
    """Returns the tallies as Markdown, with what was hit below and each problem at the end."""
    columns = ("detected", "survived", "lost", "silent")
    lines = ["| cases | tried | detected | survived | lost | silent |", "|---|" + "---:|" * 5]
    for tally in tallies:
        counts = " | ".join(str(tally.outcomes[c]) for c in columns)
        lines.append(f"| {tally.name} | {tally.tried} | {counts} |")
    sums = " | ".join(str(sum(t.outcomes[c] for t in tallies)) for c in columns)
    lines.append(f"| **all** | {sum(t.tried for t in tallies)} | {sums} |")
    for tally in tallies:
        if tally.skipped:
            lines.append(f"\n{tally.name}: skipped: {tally.skipped}")
        if tally.notes:
            hits = "; ".join(f"{note} {n}" for note, n in tally.notes.most_common())
            lines.append(f"\n{tally.name}: {hits}.")
    if problems := [problem for tally in tallies for problem in tally.problems]:
        lines += ["", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines)
