"""Training a classifier: data set, network and recipe in, a run folder out.

A run folder holds recipe.json, log.jsonl (a line per epoch) and model.safetensors (the last finished epoch). The accuracy
is that of the model in the file; no epoch is chosen by looking at the held-out images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from triscale.architecture import Arch
from triscale.data.datasets import Splits
from triscale.data.loader import Batches, evaluation_batches
from triscale.evaluate import predict_logits, top_k_accuracy
from triscale.files import write_text
from triscale.model import ConvNet, build
from triscale.recipe import Preprocess, Recipe
from triscale.train.loop import EpochEnd, Step, cross_entropy, fit
from triscale.version import __version__
from triscale.weights.model_file import ModelCard, save_model


@dataclass(frozen=True)
class Evaluated:
    """The held-out accuracy after an epoch (counted from 1), with the model that reached it."""

    epoch: int
    train_loss: float
    top1: float
    seconds: float
    net: ConvNet


@dataclass(frozen=True)
class Saved:
    """A model file that now stands whole."""

    epoch: int
    path: Path


def preprocess_for(size: int, channels: int) -> Preprocess:
    """The official evaluation crop from 96 px on; smaller images are taken whole. Grey images: mean and std one half."""
    padding = 32 if size >= 96 else 0
    return Preprocess(size, padding) if channels == 3 else Preprocess(size, padding, mean=(127.5,), std=(127.5,))


def train_classifier(splits: Splits, arch: Arch, preprocess: Preprocess, recipe: Recipe, *, evaluate_every: int = 1) -> Iterator[Step | Evaluated]:
    """Trains from scratch, yielding each Step and, every so many epochs and after the last, an Evaluated.

    The same arguments, seed and number of threads give the same numbers on the same machine.
    """
    torch.manual_seed(recipe.seed)
    net = build(arch, len(splits.classes), preprocess.channels).to(memory_format=torch.channels_last)
    batches = Batches(splits.train.images, splits.train.labels, preprocess, recipe)
    start = time.perf_counter()
    for event in fit(net, batches, cross_entropy(recipe.label_smoothing), recipe):
        if isinstance(event, EpochEnd):
            epoch = event.epoch + 1
            if epoch % evaluate_every == 0 or epoch == recipe.epochs:
                logits = predict_logits(net, evaluation_batches(splits.held_out.images, preprocess))
                top1 = top_k_accuracy(logits, splits.held_out.labels)
                yield Evaluated(epoch, event.loss, top1, time.perf_counter() - start, net)
        else:
            yield event


def run_folder(out: Path, splits: Splits, arch: Arch, preprocess: Preprocess, recipe: Recipe, data: str) -> Iterator[Step | Evaluated | Saved]:
    """`train_classifier` with its run folder written as it goes. Raises OSError where the folder can't be written."""
    write_text(out / "recipe.json", json.dumps(recipe.to_dict(), indent=1))
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        for event in train_classifier(splits, arch, preprocess, recipe):
            yield event
            if not isinstance(event, Evaluated):
                continue
            line = {"epoch": event.epoch, "loss": round(event.train_loss, 6), "top1": event.top1, "seconds": round(event.seconds, 2)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            provenance = {"data": data, "held_out": splits.held_out_is, "epoch": event.epoch, "recipe": recipe.to_dict(), "triscale": __version__}
            card = ModelCard(arch, preprocess, splits.classes, provenance, {"top1": event.top1})
            save_model(out / "model.safetensors", event.net, card)
            yield Saved(event.epoch, out / "model.safetensors")
