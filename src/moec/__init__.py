"""moec: a compiler for Mixture-of-Experts models."""
