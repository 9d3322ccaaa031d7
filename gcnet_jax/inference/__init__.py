"""Using a stored network: images in, labels or features out; evaluation and export."""
