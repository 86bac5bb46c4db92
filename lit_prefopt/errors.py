"""The one exception that is meant for the user's eyes."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names the cure.

    The command line prints the sentence without a trace.
    """
