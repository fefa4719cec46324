"""Dictionaries and activations in, evidence out: features, scans, queries, pages."""
