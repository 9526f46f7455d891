"""The run folder's files that tell how a training went: the log, and the pictures and answers that its report shows."""

from triscale.run_log.lines import EpochLine, Log, LogError, StepLine, read_log
from triscale.run_log.log import RunLog, StepWindow
from triscale.run_log.pictures import HeldOut, Samples, read_held_out, read_samples, write_held_out, write_samples

__all__ = [
    "EpochLine",
    "HeldOut",
    "Log",
    "LogError",
    "RunLog",
    "Samples",
    "StepLine",
    "StepWindow",
    "read_held_out",
    "read_log",
    "read_samples",
    "write_held_out",
    "write_samples",
]
