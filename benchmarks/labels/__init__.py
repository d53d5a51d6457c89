"""Labels on ESC-10: a natural corpus without labels, with wrong and with missing ones."""
