"""The textbook, array-agnostic; it knows nothing of adapters."""
