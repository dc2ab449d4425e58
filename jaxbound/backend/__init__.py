"""How programs are compiled, kept and placed on devices; knows nothing of bounds."""
