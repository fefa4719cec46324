"""Audio in, activations on disk: sources, plan, capture, store."""
