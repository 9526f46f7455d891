"""From files to batches: decoding, augmentation, data sets, loading."""
