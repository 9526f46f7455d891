"""Runs one part in this process, up to its time limit: python -m benchmarks.gpu.worker PART SECONDS OUT [--carried DIR] [--rehearse]."""

import argparse
import importlib
import os
import time
from pathlib import Path

from benchmarks.gpu import interpreter, machine, tuned
from benchmarks.gpu.clocks import Sampler
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.record import Record, read_earlier
from benchmarks.gpu.sweep import first_line

RESERVE = 20.0  # seconds kept back from the limit: to stop in order, and for the interpreter's own start and end


class DeviceLostError(Exception):
    """The GPU answers every call of this process with an error, as after a kernel that wrote beyond its memory: nothing more can be measured."""


class Run:
    """What a part is given. device: torch's. rehearsal: tiny shapes and few runs, on the CPU: shows that the part runs, measures nothing.

    record: where rows go. out: the folder of the records, other parts' included.
    """

    def __init__(self, part, seconds, out, found, *, rehearsal=False):
        import torch

        from benchmarks.gpu.timing import NETWORK_MS

        self.part, self.out, self.found, self.rehearsal = part, Path(out), found, rehearsal
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.end = time.monotonic() + seconds - (0 if rehearsal else RESERVE)
        self.about = machine.described(self.device.type)
        self.before = self.earlier(part.name)
        self.record = Record(out, part.name, self.about, seconds, rehearsal)
        self.longest = {}
        self.runs, self.most, self.group_ms = (2, 2, 0.01) if rehearsal else (10, 1 << 16, NETWORK_MS)

    def earlier(self, name):
        """The rows of a part's record from an earlier run on such a device, in `out` or else among the tree's results; [] where there is none."""
        body = read_earlier(self.out, name, self.about["device"], rehearsal=self.rehearsal)
        return body["rows"] if body else []

    def left(self):
        """Seconds."""
        return self.end - time.monotonic()

    def attempt(self, what, work, *, like=None, guess=5.0, spare=0.0):
        """work(), or None with a note where it fails or the time left is short. like: how its kind is called, whose longest run so far says
        how long this one may take; guess: where there was none. spare: seconds that are to be left after it. Raises DeviceLostError."""
        like = like or what
        expected = self.longest.get(like, 0.0 if self.rehearsal else guess) + (0.0 if self.rehearsal else spare)
        if self.left() < expected:
            self.record.note(f"{what}: not begun, {max(self.left(), 0):.0f} s left, {expected:.0f} s expected")
            self.cut = True
            return None
        print(f"  {what} ({self.left():.0f} s left)", flush=True)
        start = time.monotonic()
        try:
            return work()
        except DeviceLostError:
            raise
        except Exception as error:  # the peers' failures are findings: the next case goes on
            self.record.note(f"{what}: {first_line(error)}")
        finally:
            self.longest[like] = max(self.longest.get(like, 0.0), time.monotonic() - start)
        self.sound()
        return None

    def sound(self):
        """Raises DeviceLostError where the device doesn't answer any more: after any exception, for some of CUDA's stay."""
        if self.device.type == "cuda":
            import torch

            try:
                torch.cuda.synchronize(self.device)
            except Exception as error:
                raise DeviceLostError(first_line(error)) from error

    cut = False  # whether time ran out before all was done


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[p.name for p in PARTS])
    parser.add_argument("seconds", type=float)
    parser.add_argument("out")
    parser.add_argument("--carried")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    found = machine.carried(options.carried)
    machine.add_wheels(found)
    if options.rehearse:
        interpreter.mend()
    part = next(p for p in PARTS if p.name == options.part)
    if part.name != "tests":  # which are to find nothing there, and to leave nothing
        tuned.use(options.out)
    run = Run(part, options.seconds, options.out, found, rehearsal=options.rehearse)
    sampler = Sampler()
    try:
        if run.device.type == "cuda":
            sampler.start()
        carry_out(run, sampler)
    except BaseException as error:
        run.record.note(first_line(error))
        run.record.end("crashed", after(sampler))
        raise
    finally:
        sampler.stop()


def carry_out(run, sampler=None):
    import torch

    # cuDNN tries its algorithms at each new shape: peers at their best.
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    module, function = run.part.runs.split(":")
    work = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    work(run, *([run.part.network] if run.part.network else []))
    run.record.end("out of time" if run.cut else "done", after(sampler))


def after(sampler):
    """For a record, at its end: the clocks after the part and while something was timed."""
    from benchmarks.gpu.timing import WINDOWS

    return {"smi_after": machine.smi(), "clocks_timed": sampler.summary(WINDOWS) if sampler else {}}


if __name__ == "__main__":
    main()
