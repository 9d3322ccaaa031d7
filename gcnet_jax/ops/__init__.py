"""What detectors are made of and no library has right: boxes, suppression, aligned pooling."""
