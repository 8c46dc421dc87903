"""What HTTP says about time, as a client that has little of it understands it."""

import datetime
import email.utils
import re


def asked_wait(header: str) -> float:
    """Returns the seconds that a Retry-After asks for (RFC 9110, section 10.2.3).

    Args:
      header: a number of seconds, also one with a fraction, or a date. Anything else,
        a negative number and a date that has passed ask for nothing: 0.
    """
    text = header.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):  # "²" is a digit too, for str.isdigit
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    if until.tzinfo is None:  # "-0000": the time is UTC, the place is not told
        until = until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
