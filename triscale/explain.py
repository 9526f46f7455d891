"""Where in an image a network finds its evidence: class activation maps, Grad-CAM, and their places in pixels.

CAM: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150), as in Figure 7 of
the EfficientNet paper. Grad-CAM: Selvaraju et al., ICCV 2017 (arXiv 1610.02391).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from triscale.model import ConvNet
from triscale.naming import unknown

COLOURS = "inferno"  # its lightness rises steadily: black to yellow, and black to white in grey print
OPACITY = 0.6  # of the colours over the picture


def has_linear_head(net: nn.Module) -> bool:
    """Whether `class_activation` can explain `net`: global average pooling and one linear layer follow `net.features`."""
    return isinstance(net, ConvNet) and isinstance(net.classifier, nn.Linear)


def class_activation(net: ConvNet, x: Tensor, classes: Tensor | Sequence[int] | None = None) -> Tensor:
    """The class activation map: at each position sum_k w[class, k] features[k], without the bias.

    x: (N, C, H, W), normalised as the network expects. classes: a class index per image; the predicted one unless given.
    Returns (N, h, w) float32 on the features' grid. The mean of a map plus the class's bias is its logit, at every input
    size, so a map divides the logit exactly over the positions. Runs in evaluation mode; each module's mode is put back.
    Raises ValueError where the head is not global average pooling and a linear layer, or for other shapes and classes.
    Source: Zhou et al. 2016, eq. 2.
    """
    _check_input(x)
    if not isinstance(net, ConvNet) or net.classifier is None:
        raise ValueError("class_activation: expected a ConvNet with a classifier, found none; build it with num_classes of 1 or more")
    if not isinstance(net.classifier, nn.Linear):
        raise ValueError(f"class_activation: expected a linear classifier, found {type(net.classifier).__name__}; grad_cam takes any")
    with _evaluating(net), torch.no_grad():
        features = net.features(x)
        chosen = _classes(classes, net.classifier(features.mean((2, 3))))
        return torch.einsum("nchw,nc->nhw", features.float(), net.classifier.weight[chosen].float())


def grad_cam(net: nn.Module, x: Tensor, classes: Tensor | Sequence[int] | None = None, target: str = "features") -> Tensor:
    """Grad-CAM: max(0, sum_k a[k] A[k]), a[k] the mean over positions of d logit[class] / d A[k].

    x, classes: as for `class_activation`. target: which feature map A is: "features", the last one; a stage of
    `net.stages` such as "stride16"; for a network that is no ConvNet, the name of a submodule with a 4-D output.
    Returns (N, h, w) float32. Of the last features of a network with a linear head it is max(0, CAM) / (h w). Runs in
    evaluation mode and leaves the parameters' gradients alone. Raises ValueError for other shapes, classes and targets.
    Source: Selvaraju et al. 2017, eq. 1 and 2.
    """
    _check_input(x)
    if isinstance(net, ConvNet) and net.classifier is None:
        raise ValueError("grad_cam: expected a network with a classifier, found none; build it with num_classes of 1 or more")
    module, seen = _module(net, target), []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"grad_cam: expected '{target}' to give a feature map (N, C, h, w)")
        seen.append(output.detach().requires_grad_())  # the graph starts here: nothing is differentiated further down
        return seen[-1].clone()  # what follows may work in place

    # A forward hook, because the rest of the network after a stage has no name of its own.
    handle = module.register_forward_hook(keep)
    try:
        with _evaluating(net), torch.enable_grad():
            logits = net(x)
            if len(seen) != 1:
                raise ValueError(f"grad_cam: expected '{target}' to run once in a forward pass, it ran {len(seen)} times")
            chosen = _classes(classes, logits)
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), seen)
    finally:
        handle.remove()
    return torch.einsum("nchw,nc->nhw", seen[0].detach().float(), gradient.float().mean((2, 3))).relu()


def cell_centres(net: nn.Module, size: tuple[int, int], target: str = "features") -> tuple[Tensor, Tensor] | None:
    """The pixel row of each row of the feature grid, and the pixel column of each column, of an input of `size` (H, W).

    float32; pixel i has its centre at i. None for a network that is no ConvNet: its geometry is unknown.

    Cells lie a stride apart. SAME padding ties the last cell to the last pixel, symmetric padding the first to the first,
    so by padding alone the grid is up to half a cell off the middle. Training takes that out: a network looks, through
    learned filters, evenly over inputs of its training size, `arch.resolution`. At that size the grid is therefore
    centred, and at others it moves with its tied end. Measured with EfficientNetV2-B0 (SAME, trained at even sizes) on
    objects at random places, 11 sizes from 192 to 321 pixels: a map's centroid lies 4 to 6 pixels, a sixth of a cell, left
    of the object's centre at every size. With the grid resized evenly it wanders from 6 left to 10 right. The two agree
    where the stride divides both sizes.
    """
    if not isinstance(net, ConvNet):
        return None
    _module(net, target)  # refuses an unknown one
    stride = net.stage_strides[-1] if target == "features" else int(target.removeprefix("stride"))

    def along(pixels: int) -> Tensor:
        cells = -(-pixels // stride)
        spare, spare_in_training = _spare(pixels, stride), _spare(net.arch.resolution, stride)
        first = spare - spare_in_training / 2 if net.arch.numerics.padding == "same" else spare_in_training / 2
        return first + stride * torch.arange(cells, dtype=torch.float32)

    return along(size[0]), along(size[1])


def _spare(pixels: int, stride: int) -> int:
    """Pixels that the span from the first cell's centre to the last's leaves over: 0 to stride - 1."""
    return pixels - 1 - stride * (-(-pixels // stride) - 1)


def upsample(maps: Tensor, size: tuple[int, int], centres: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Maps (..., h, w) at every pixel of `size` (H, W): bilinear between the cells, constant beyond the outer ones.

    centres: of `cell_centres`; without them the grid spans the input evenly, which is bilinear resizing with
    align_corners=False. Returns (..., H, W) float32.
    """
    rows, columns = (_weights(maps.shape[axis], size[axis], None if centres is None else centres[axis]).to(device=maps.device) for axis in (-2, -1))
    return rows @ maps.float() @ columns.T


def _weights(cells: int, pixels: int, centres: Tensor | None) -> Tensor:
    """(pixels, cells): how much of each cell a pixel takes."""
    if centres is None:
        centres = (torch.arange(cells, dtype=torch.float32) + 0.5) * (pixels / cells) - 0.5
    if len(centres) != cells:
        raise ValueError(f"upsample: expected {cells} centres, one a cell, found {len(centres)}")
    step = float(centres[1] - centres[0]) if cells > 1 else 1.0
    at = ((torch.arange(pixels, dtype=torch.float32) - centres[0]) / step).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells)).abs()).clamp(min=0)


def peak(grid: Tensor, size: tuple[int, int], centres: tuple[Tensor, Tensor] | None = None) -> tuple[float, float] | None:
    """Where one map (h, w) is largest: (row, column), each from 0 (top, left) to 1. None where the map is constant.

    The centre of the largest cell, the first one of equals; a centre outside the image is put on its edge.
    """
    if bool(grid.max() == grid.min()):
        return None
    cell, found = divmod(int(grid.argmax()), grid.shape[1]), []
    for axis in (0, 1):
        if centres is None:
            found.append((cell[axis] + 0.5) / grid.shape[axis])
        else:
            found.append(min(max((float(centres[axis][cell[axis]]) + 0.5) / size[axis], 0.0), 1.0))
    return found[0], found[1]


def overlay(image: np.ndarray, heat: Tensor | np.ndarray) -> np.ndarray:
    """The map's colours over the image in grey: (H, W, 3) uint8.

    image: (H, W, 3) or (H, W, 1) uint8. heat: (H, W), of `upsample`. Its minimum is black and its maximum pale yellow, so
    brightness can't be compared between maps; a constant map has the colour of the minimum. Raises ValueError for other
    shapes and for values that are not finite.
    """
    values = heat.detach().cpu().numpy() if isinstance(heat, Tensor) else heat
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or image.shape[:2] != values.shape:
        raise ValueError(f"overlay: expected an image (H, W, 3) uint8 and a map (H, W), found {image.shape} {image.dtype} and {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("overlay: expected finite values in the map, found others")
    low, high = float(values.min()), float(values.max())
    colours = palette((values.astype(np.float64) - low) / (high - low if high > low else 1.0))
    grey = image @ np.array([0.299, 0.587, 0.114]) if image.shape[2] == 3 else image[:, :, 0].astype(float)
    return np.rint(OPACITY * colours + (1 - OPACITY) * grey[:, :, None]).astype(np.uint8)


def palette(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as colours 0..255: (...) float -> (..., 3) float."""
    from matplotlib import colormaps

    return 255 * np.asarray(colormaps[COLOURS](values))[..., :3]


def _module(net: nn.Module, target: str) -> nn.Module:
    """The module whose output is the feature map `target`."""
    places: dict[str, nn.Module] = {}
    if isinstance(net, ConvNet):
        if net.pool is not None:
            places[f"stride{net.arch.stem.stride}"] = net.stem
        for stage, stride in zip(net.body, net.stage_strides, strict=True):
            places[f"stride{stride}"] = cast(nn.ModuleList, stage)[-1]
        places["features"] = net.head if net.head is not None else cast(nn.ModuleList, net.body[-1])[-1]
    else:
        places = dict(net.named_modules())
    if target not in places:
        raise unknown("feature map", target, places)
    return places[target]


def _check_input(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"explain: expected a float batch (N, C, H, W), found {tuple(x.shape)} {x.dtype}")


def _classes(classes: Tensor | Sequence[int] | None, logits: Tensor) -> Tensor:
    """One class index per image, on the logits' device."""
    if logits.ndim != 2:
        raise ValueError(f"explain: expected logits (N, classes), found {tuple(logits.shape)}")
    if classes is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(classes, device=logits.device)
    if chosen.shape != logits.shape[:1] or chosen.is_floating_point() or not bool(((chosen >= 0) & (chosen < logits.shape[1])).all()):
        raise ValueError(f"explain: expected {logits.shape[0]} class indices from 0 to {logits.shape[1] - 1}, found {chosen.tolist()}"[:200])
    return chosen.long()


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every module has its own mode back, frozen norms too."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
