"""Priors p(codes), the generators, and their cached samplers."""
