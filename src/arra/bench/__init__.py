"""How fast things are on the machine at hand, and how far that is from what they could be."""
