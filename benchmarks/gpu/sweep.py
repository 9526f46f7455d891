"""The best batch size: doubled until memory runs out, or more images bring nothing."""

import torch

GAIN = 1.02  # over the best so far; less is noise
PATIENCE = 2  # doublings in a row that gain less: rates are not smooth in the batch


def sweep(measure, start, *, most=1 << 16, patience=PATIENCE, left=lambda: True):
    """({batch: images/s}, why it ended). measure(batch): images/s. left(): whether there is time for one more.

    torch.OutOfMemoryError ends it, and so does a RuntimeError, with which cuDNN refuses tensors over 2^31 elements, unless
    it is the first batch's: that one is raised.
    """
    found, idle, batch = {}, 0, start
    while batch <= most:
        if not left():
            return found, f"no time for batch {batch}"
        best = max(found.values(), default=0.0)
        try:
            found[batch] = measure(batch)
        except torch.OutOfMemoryError:
            return found, f"out of memory at batch {batch}"
        except RuntimeError as error:
            if not found:
                raise
            return found, f"refused at batch {batch}: {first_line(error)}"
        idle = 0 if found[batch] > GAIN * best else idle + 1
        if idle == patience:
            return found, f"no gain above batch {best_batch(found)}"
        batch *= 2
    return found, f"largest batch {most}"


def best_batch(found):
    """The smallest batch within the noise of the best rate."""
    best = max(found.values())
    return min(batch for batch, rate in found.items() if rate * GAIN >= best)


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
