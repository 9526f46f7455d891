"""predict: image files in, classes out."""

from __future__ import annotations

import json as json_module
import sys

from triscale.text import aligned


def predict(files: list[str], /, *, weights: str, top: int = 5, batch: int = 32, json: bool = False, threads: int | None = None) -> int:
    """Classify image files with a model file, which alone carries the network, its preprocessing and the class names.

    Args:
        files: image files, or folders of them.
        weights: a model file (.safetensors) that triscale wrote.
        top: classes to print for each file.
        batch: images at a time.
        json: a JSON object a line instead of a table.
        threads: CPU threads; torch's own choice unless given.
    """
    if top < 1 or batch < 1:
        raise ValueError(f"--top and --batch: expected 1 or more, found {top} and {batch}")
    import torch

    from triscale.latency import set_threads
    from triscale.predict import Prediction, image_files, predict_files
    from triscale.weights.model_file import load_model

    set_threads(threads)
    net, card = load_model(weights)
    net = net.to(memory_format=torch.channels_last)
    paths = image_files(files)
    if not paths:
        raise ValueError(f"no image files in {', '.join(files)}")
    rows: list[tuple[str, ...]] = []
    failures = 0
    for result in predict_files(paths, net, card.preprocess, card.classes, top=top, batch_size=batch):
        if not isinstance(result, Prediction):
            failures += 1
            print(f"triscale predict: {result.reason}", file=sys.stderr)
        elif json:
            print(json_module.dumps({"file": result.file, "top": [{"class": c, "probability": p} for c, p in result.top]}), flush=True)
        else:
            rows += [(result.file if i == 0 else "", c, f"{100 * p:.2f} %") for i, (c, p) in enumerate(result.top)]
    if rows:
        print(aligned(("file", "class", "probability"), rows, left=(0, 1)))
    if failures:
        print(f"triscale predict: {failures} of {len(paths)} files could not be read", file=sys.stderr)
    return 0 if not failures else 2 if failures == len(paths) else 1
