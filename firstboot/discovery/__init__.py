"""Ways to find peers, one per file, behind one interface."""
