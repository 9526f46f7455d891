"""The page of a training, during it and after."""

from triscale.training_report.page import training_page

__all__ = ["training_page"]
