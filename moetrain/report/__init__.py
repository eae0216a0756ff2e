"""The report of a run: report.html, and the picture that a README shows."""

from moetrain.report.figures import figure_for_readme
from moetrain.report.page import render_report

__all__ = ["figure_for_readme", "render_report"]
