"""The one exception that means: the user can mend this."""


class UsageError(ValueError):
    """A fault in what the user gave: a path, an option, an annotation file, weights that do not fit.

    The message names the file and the value and says what to do. `train.py` prints it without a traceback
    and exits with code 2.
    """
