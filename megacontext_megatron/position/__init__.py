"""How place becomes numbers: frequencies, phases, Gaussian damping, and the registry of encodings."""
