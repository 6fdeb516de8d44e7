"""``featx search --report``: what a search found, as one HTML file that needs no network."""

from featx.cli.report.page import check_can_report, write_report

__all__ = ["check_can_report", "write_report"]
