"""The one exception that means: the user can mend this. Its message is one sentence: what, where, what to do."""


class UsageError(Exception):
    """A mistake in options, files or surroundings; shown by rank 0 without a traceback, exit status 2 on every rank."""
