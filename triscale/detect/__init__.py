"""Detection: RetinaNet on any network of the package."""
