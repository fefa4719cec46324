"""How micro and its speech were made: synthesis with espeak-ng, training, packing. For developers: `python -m cache.micro.recipe`."""
