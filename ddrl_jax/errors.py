"""The one exception a user is meant to read: got, wanted, and the way out."""


class UserError(Exception):
    """A problem the user can fix; `main` prints it without a traceback.

    Args:
      what: what is wrong, in one sentence that names the key, file or sample.
      got: the offending value.
      wanted: what would have been accepted.
      way_out: what to change or run.
    """

    def __init__(self, what: str, *, got: object, wanted: str, way_out: str):
        self.what, self.got, self.wanted, self.way_out = what, got, wanted, way_out
        super().__init__(
            f"{what}\n  got:     {got}\n  wanted:  {wanted}\n  way out: {way_out}"
        )
