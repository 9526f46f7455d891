"""The classes of ImageNet, where the readers of data sets look for them."""

from triscale.imagenet import imagenet_classes

__all__ = ["imagenet_classes"]
