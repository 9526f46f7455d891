"""The page of a search, at any time of it, and its plots as files."""

from triscale.search_report.page import plots, render

__all__ = ["plots", "render"]
