"""Reports in forms that other programs and people read. Nothing is computed here."""
