"""One fusion method per file."""
