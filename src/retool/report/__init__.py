"""The report of a run: one HTML file that needs nothing else, made from the run folder alone."""

from retool.report.page import write_report

__all__ = ["write_report"]
