"""Images: which files, decoded how, kept where, split into training and held-out ones."""
