"""Exact evaluation: every image once, none dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def predict_logits(net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Logits (N, classes) float32 on the CPU, in order, of batches (B, C, S, S) that are ready for the network."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    with torch.no_grad():
        parts = [net(batch.to(device)).float().cpu() for batch in batches]
    net.train(was_training)
    return torch.cat(parts)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k largest logits."""
    return logits.topk(min(k, logits.shape[1]), dim=1).indices.eq(labels[:, None]).any(1).float().mean().item()
