"""The one exception a user is meant to read: got, wanted, and the way out."""

EXIT_ERROR = 2  # a mistake: the same command would end in it again
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class UserError(Exception):
    """A problem the user can fix; `main` prints it without a traceback.

    Args:
      what: what is wrong, in one sentence that names the key, file or sample.
      got: the offending value.
      wanted: what would have been accepted.
      way_out: what to change or run.

    Attributes:
      status: of the process that ends by it.
    """

    status = EXIT_ERROR

    def __init__(self, what: str, *, got: object, wanted: str, way_out: str):
        self.what, self.got, self.wanted, self.way_out = what, got, wanted, way_out
        super().__init__(
            f"{what}\n  got:     {got}\n  wanted:  {wanted}\n  way out: {way_out}"
        )


class TryAgain(UserError):
    """Nothing of the command is wrong: started again, the run goes on."""

    status = EXIT_AGAIN
