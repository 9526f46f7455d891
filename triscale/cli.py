"""The command line. Each command is a typed function; its options are declared there once, and tyro reads them.

Exit status: 0 all done; 1 part of the inputs failed, each named; 2 nothing done; 3 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

DONE, PARTLY, NOTHING, INTERRUPTED = 0, 1, 2, 3

# command -> (module with a function of that name, one line). The modules are loaded when their command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "models": ("commands.networks", "the named networks with parameters, MACs and memory"),
    "show": ("commands.networks", "one network as the paper's Table 1, with its cost"),
    "scale": ("commands.networks", "scale a network: by phi, to a budget, or by multipliers"),
    "demo": ("commands.demonstration", "the paper's idea on real scans, in two minutes on two cores"),
    "train": ("commands.training", "train a network on images, from scratch or from a checkpoint"),
    "predict": ("commands.prediction", "classify image files with any checkpoint of these networks"),
    "eval": ("commands.evaluation", "exact top-1 and top-5 on a folder, accuracy by class, confusion matrix"),
    "explain": ("commands.explaining", "where in pictures networks find their evidence, as overlays"),
    "pack": ("commands.packing", "a data set as tar shards with an index, which training reads several times faster"),
    "search coefficients": ("commands.searching", "alpha, beta, gamma of compound scaling, found on your images"),
    "search network": ("commands.searching", "a network for your images, found in MnasNet's space within a cost"),
    "detect train": ("commands.detect_training", "a RetinaNet on any of the networks, on boxes in COCO's format"),
    "detect eval": ("commands.detect_evaluation", "COCO's twelve numbers of a detector, by class, precision-recall curves"),
    "detect predict": ("commands.detect_prediction", "boxes in image files, drawn on PNGs and as COCO results"),
    "detect convert": ("commands.detect_converting", "Pascal VOC's boxes as COCO's, mmdetection's checkpoints as ours"),
    "detect export": ("commands.detect_converting", "a detector as ONNX, with or without NMS, or under mmdetection's names"),
    "convert": ("commands.prediction", "weights from any code base's names and format to another's"),
    "bench": ("commands.measuring", "latency of networks by the paper's Table 4 protocol"),
    "reproduce": ("commands.measuring", "a table or figure of the paper, ours beside it"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name.ljust(width)}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: triscale COMMAND [options]\n\n"
        "EfficientNet as a system: a network is data, scaling is a function on it.\n\n"
        f"commands:\n{rows}\n\n"
        "triscale COMMAND --help tells each command's options; triscale --version the version.\n"
        "Exit status: 0 all done; 1 part of the inputs failed, each named; 2 nothing done; 3 interrupted."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status. A user's mistake is one line on standard error and status 2."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(DONE if args else NOTHING)
    if args[0] in ("--version", "-V"):
        from triscale.version import __version__

        print(f"triscale {__version__}")
        sys.exit(DONE)
    words = 2 if " ".join(args[:2]) in COMMANDS else 1
    sys.exit(_run(" ".join(args[:words]), args[words:]))


def _run(command: str, args: list[str]) -> int:
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    # Read when torch is loaded. By default waiting threads spin; where another process wants the core, a training step on
    # two cores then took 1.4 to 2 s instead of 0.34 s (0.2 s alone, with or without spinning).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if parts := [name for name in COMMANDS if name.startswith(f"{command} ")]:
            return _parts(command, parts, args)
        if command not in COMMANDS:
            from triscale.naming import unknown

            raise unknown("command", command, COMMANDS)
        return _call(command, args)
    except KeyboardInterrupt as stop:
        print(f"triscale {command}: stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ImportError as error:
        print(f"triscale {command}: the installation is incomplete ({error}); run its pip install, or make demo, once more", file=sys.stderr)
        return NOTHING
    except RuntimeError as error:
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        print(f"triscale {command}: not enough memory ({' '.join(str(error).split())[-160:]})", file=sys.stderr)
        return NOTHING
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"triscale {command}: {message}", file=sys.stderr)
        return NOTHING


def _parts(command: str, parts: Sequence[str], args: Sequence[str]) -> int:
    """A command of two words with the first alone, or a second that there isn't."""
    from triscale.text import aligned

    if args and args[0] not in ("-h", "--help"):
        from triscale.naming import unknown

        raise unknown("command", f"{command} {args[0]}", parts)
    print(f"usage: triscale {command} ...\n\n{aligned(('command', 'what it does'), [(name, COMMANDS[name][1]) for name in parts], left=(0, 1))}")
    print("\ntriscale COMMAND --help tells each command's options.")
    return DONE if args else NOTHING


def _call(command: str, args: list[str]) -> int:
    import tyro

    from triscale.commands import TYRO

    module = import_module(f"triscale.{COMMANDS[command][0]}")
    if command == "train":
        return int(module.train(module.train_options(args)))
    if command.startswith(("search ", "detect ")):
        return int(getattr(module, command.replace(" ", "_"))(args))
    function: Callable[..., int] = getattr(module, command)
    return tyro.cli(function, args=args, prog=f"triscale {command}", config=TYRO)


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
