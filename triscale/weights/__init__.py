"""Weights from elsewhere: name maps, file formats, strict loading."""
