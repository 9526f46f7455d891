"""Exact evaluation: every image once, none dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triscale.data.loader import normalise
from triscale.recipe import Preprocess


def predict_logits(net: nn.Module, images: Tensor, preprocess: Preprocess, batch_size: int = 256) -> Tensor:
    """Logits (N, classes) float32 of images (N, C, S, S) uint8 that are already cropped and resized."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    with torch.no_grad():
        parts = [net(normalise(part.to(device), preprocess)).float().cpu() for part in torch.split(images, batch_size)]
    net.train(was_training)
    return torch.cat(parts)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k largest logits."""
    return logits.topk(min(k, logits.shape[1]), dim=1).indices.eq(labels[:, None]).any(1).float().mean().item()
