"""Image <-> codes: VQ-VAE, VQ-VAE-2, and the encoded data set."""
