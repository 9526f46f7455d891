"""Training a classifier: data, network and recipe in, a run folder out."""

from triscale.classify.events import Evaluated
from triscale.classify.pictures import Data, prepare, preprocess_for
from triscale.classify.proxy import ProxyScore
from triscale.classify.run import run_folder, train_classifier
from triscale.classify.start import Start, start_from
from triscale.train.events import Resumed, ResumeError, Running, Saved, Stopped

__all__ = [
    "Data",
    "Evaluated",
    "ProxyScore",
    "ResumeError",
    "Resumed",
    "Running",
    "Saved",
    "Start",
    "Stopped",
    "prepare",
    "preprocess_for",
    "run_folder",
    "start_from",
    "train_classifier",
]
