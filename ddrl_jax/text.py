"""What counts as text."""


def is_text(value: object) -> bool:
    """Whether it is a string of valid Unicode.

    Half a surrogate pair is none, which cut JSON may have, and which Python makes of
    bytes on a command line that are not UTF-8.
    """
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
