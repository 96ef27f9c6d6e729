"""The errors that a user of the command line may meet, each one clear sentence."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence: what was given, what is allowed, what to do. Programs
    print it without a stack trace and exit with code 2.
    """


class WorkdirInUse(UserError):
    """Another process trains in the workdir."""


class DivergedError(Exception):
    """Training met a non-finite loss or gradient. Programs exit with code 3.

    Attributes:
      step: the last one at which all was finite, None if that is not known here.
    """

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class InterruptedRun(Exception):
    """SIGTERM or Ctrl-C stopped the run after saving it. Programs exit with code 75."""


EXIT_CODES = {UserError: 2, DivergedError: 3, InterruptedRun: 75}
