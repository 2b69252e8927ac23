"""One file per kind of update."""
