"""What a GPU does with EfficientNet: tests, kernels, whole networks and peers, in parts that are run alone. See __main__.py."""
