"""A run, or several beside each other, as one HTML file that needs no network."""

from matilda_train.report.page import write_report

__all__ = ["write_report"]
