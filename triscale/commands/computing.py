"""How training is carried out, whatever is trained: the options of `train` and `detect train` that change nothing of what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from triscale.commands.following import FIRST, PROCESSES, StopSignal
from triscale.commands.run_folder import run_folder

if TYPE_CHECKING:
    from triscale.train.events import Running
    from triscale.train.plan import Plan


@dataclass(frozen=True)
class Computing:
    """How a step is computed."""

    device: str = "cpu"
    """cpu, cuda, or auto."""
    threads: int | None = None
    """CPU threads; torch's own choice unless given."""
    broken_share: float = 0.05
    """Share of the images that may be unreadable; they are left out and listed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions: auto is bfloat16 on an accelerator that has it, float32 on a CPU."""
    micro_batch: int = 0
    """Images at a time; 0: all of a process's share of the batch. A detector's parts are each normalised by their own positive anchors."""
    memory: str | None = None
    """The largest --micro-batch whose step's tensors fit this, e.g. 2GB, counted in float32 without --recompute."""
    recompute: bool = False
    """Keep only the blocks' outputs, and compute what is inside them again in the backward pass."""
    compile: bool = False
    """Use torch.compile."""
    shard: bool = False
    """Share the optimiser's state out over the processes."""

    def plan(self) -> Plan:
        """Without --memory, which the network decides. Raises ValueError where that is given beside --micro-batch."""
        from triscale.train.plan import Plan

        if self.memory is not None and self.micro_batch:
            raise ValueError("--memory and --micro-batch: expected one of the two")
        return Plan(self.device, self.precision, self.micro_batch, self.recompute, self.compile)


@dataclass(frozen=True)
class Keeping:
    """What is kept of a run, and where."""

    out: Path | None = None
    """The run folder; runs/DATA-NETWORK, with a number where that is taken, unless given."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out, where there is one."""
    save_every: int = 0
    """Steps between checkpoints, beside those at the end of each epoch."""
    tensorboard: bool = False
    """Write TensorBoard's curves too."""

    def folder(self, name: str) -> Path:
        """The run folder, made by the first process; named after `name` unless given."""
        return run_folder(self.out, name, self.resume, FIRST)

    def check(self) -> None:
        """Raises ValueError where several processes aren't told their folder, and for a number below 0."""
        if self.out is None and PROCESSES > 1:
            raise ValueError("--out: several processes need to be told their folder")
        if self.save_every < 0:
            raise ValueError(f"--save-every: expected 0 or more, found {self.save_every}")


def make_running(plan: Plan, workers: int, computing: Computing, keeping: Keeping) -> Running:
    """How the run is carried out, with an end on request."""
    from triscale.train.events import Running

    return Running(
        plan,
        workers,
        keeping.save_every,
        resume=keeping.resume,
        shard=computing.shard,
        tensorboard=keeping.tensorboard,
        broken_share=computing.broken_share,
        stop=StopSignal(),
    )
