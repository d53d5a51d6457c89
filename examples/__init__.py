"""Short scripts that run as they are: ``python -m examples.separate_corpus [FOLDER]``."""
