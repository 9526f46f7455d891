"""A network made to fit the data it is for: its input size, and a budget."""

from __future__ import annotations

from collections.abc import Callable

from triscale.architecture import Arch
from triscale.budget import Workload, fit_budget
from triscale.quantities import count
from triscale.scaling import Coefficients, fit_input

SMALL = {"digits": 16, "cifar10": 32, "cifar100": 32}  # input sizes; their pictures are shown whole


def fitted(arch: Arch, data: str, resolution: int | None, macs: str | None, counted: tuple[int, int], tell: Callable[[str], object]) -> Arch:
    """`arch` at an input size, that of a data set of small pictures unless given, with fewer strides where the last map would be
    smaller than 4 x 4, and within a budget of multiply-adds. counted: classes and input channels."""
    resolution = SMALL.get(data) if resolution is None else resolution
    arch = fit_input(arch, arch.resolution if resolution is None else resolution)
    if macs is None:
        return arch
    # An input size that is asked for stays: the budget is then met by depth and width alone.
    coefficients = Coefficients() if resolution is None else Coefficients(gamma=1.0)
    fit = fit_budget(arch, macs=count(macs), coefficients=coefficients, workload=Workload(num_classes=counted[0], in_channels=counted[1]))
    tell(str(fit))
    return fit.arch
