"""Speed: the cost of a pass, of scoring, and of selections that refer to stems instead of copying them."""
