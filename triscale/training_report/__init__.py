"""The page of a training, during it and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["training_page"]


def training_page(folder: Path) -> dict[str, Any]:
    """What report.html is filled with. Files that are not there yet leave their part out. Raises ReportError."""
    from triscale.training_report.folder import of_detector

    if of_detector(folder):  # whose code brings torchvision, which takes a second to import
        from triscale.training_report.detector import detector_page

        return detector_page(folder)
    from triscale.training_report.classifier import classifier_page

    return classifier_page(folder)
