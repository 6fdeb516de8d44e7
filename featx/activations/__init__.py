"""From batches of images to feature rows: taps, pooling and the loop around them."""
