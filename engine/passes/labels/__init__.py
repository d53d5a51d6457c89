"""A pass that tags recordings without labels, and the labels that follow from its tags."""
