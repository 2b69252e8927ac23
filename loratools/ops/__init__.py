"""One verb per file; pure."""
