"""``--report``: what a search found, or how good a model is, as one HTML file that needs no network."""

from featx.cli.report.model import ModelReport, basename
from featx.cli.report.page import check_can_report, write_model_report, write_report

__all__ = ["ModelReport", "basename", "check_can_report", "write_model_report", "write_report"]
