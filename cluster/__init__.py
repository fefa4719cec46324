"""Runs the three packages below on Ray, and the command line."""
