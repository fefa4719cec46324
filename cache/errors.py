"""The errors that are for people."""


class HearsaeError(Exception):
    """What was wrong, where, and what to do, in one line. The command line prints it without a traceback."""


class StoreError(HearsaeError):
    """An activation store that is missing, damaged, or made differently."""


class SourceError(HearsaeError):
    """A dataset, or one file of it, that can't be read as audio."""


class ModelError(HearsaeError):
    """A checkpoint that can't be loaded, or can't do what was asked of it."""


class RemoteError(HearsaeError):
    """An object store that refuses, fails, can't be reached, or has no such bucket."""
