"""The GPU's clocks while something was timed: one nvidia-smi beside the part, asked five times a second."""

import contextlib
import datetime
import statistics
import subprocess
import threading
from collections import Counter

FIELDS = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
COMMAND = ("nvidia-smi", "--id=0", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "-lms", "200")
# Bits of clocks_event_reasons.active (NVML). What lowers the clock under load is told; idle and the application's own setting aren't.
REASONS = {
    0x4: "power limit", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip
SLACK = 0.2  # seconds: how far a sample may lie outside what was timed


class Sampler:
    """Samples from `start` to `stop`; none where nvidia-smi isn't there or doesn't answer."""

    def __init__(self, command=COMMAND):
        self.command, self.child, self.lines = command, None, []

    def start(self):
        with contextlib.suppress(OSError):
            self.child = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=lambda: self.lines.extend(self.child.stdout), daemon=True).start()
        return self

    def stop(self):
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    def summary(self, windows):
        return summary(list(self.lines), windows)


def summary(lines, windows):
    """Of the samples within the windows (start, end in seconds): how many, clocks in MHz, watts, °C, and the share of samples by reason of a
    lowered clock. {} where there are none. Lines that aren't understood are left out."""
    found = [sample for sample in map(_sample, lines) if sample and any(a - SLACK <= sample[0] <= b + SLACK for a, b in windows)]
    if not found:
        return {}
    _, sm, memory, watts, degrees, reasons = zip(*found, strict=True)
    count = Counter(name for bits in reasons for bit, name in REASONS.items() if bits & bit)
    lowered = {name: round(n / len(found), 3) for name, n in count.items()}
    clocks = {"sm_mhz": statistics.median(sm), "sm_mhz_min": min(sm), "sm_mhz_max": max(sm), "memory_mhz": statistics.median(memory)}
    return {"samples": len(found), **clocks, "watts_max": max(watts), "degrees_max": max(degrees), "lowered": lowered}


def _sample(line):
    """(seconds, MHz, MHz, W, °C, reasons) of a line of nvidia-smi's; None where it is something else."""
    try:
        stamp, *numbers, reasons = (part.strip() for part in line.split(","))
        seconds = datetime.datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f").timestamp()
        sm, memory, watts, degrees = map(float, numbers)
        return seconds, sm, memory, watts, degrees, int(reasons, 16)
    except ValueError:
        return None
