"""What keys mean: one file per format."""
