"""Training data: sounds that can be loaded, and the mixtures that are made of them."""
