"""Activations in, dictionaries out: the sparse autoencoders, their stream, training and metrics."""
