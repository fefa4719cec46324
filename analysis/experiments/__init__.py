"""The published experiments as functions, one module each, and the parts that they share."""
