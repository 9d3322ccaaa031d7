"""Images for training and evaluation: TFDS sources, decoding and augmentation, batches."""
