"""Addresses as people write them: no secret may stand in one, since addresses are shown and kept.

s3://KEY:SECRET@bucket/x      https://host/x?X-Amz-Signature=…      both are refused
"""

from __future__ import annotations

import re

REMEDY = (
    "a secret in an address would be kept with the run and shown; leave it out, and give it to "
    "every node by environment variables (such as AWS_ACCESS_KEY_ID), a profile, or a role"
)
_MASK = "***"
_CHAINED = re.compile(r"(::)(?=[A-Za-z][\w+.-]*://)")  # fsspec's zip://a.csv::s3://bucket/a.zip
_LOGIN = re.compile(r"([A-Za-z][\w+.-]*://)([^\s\"'<>@]*:[^\s\"'<>@]*)@")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_PARAMETER = re.compile(
    r"([?&;#](?:[\w.-]*(?:signature|credentials?|token|secret|password|passwd|passphrase"
    r"|(?:api|access|secret|private|account)[_-]?key(?:[_-]?id)?)|sig|sas|pwd|auth)=)[^&;#\s\"'<>]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """A text in which the secrets of all addresses are replaced by asterisks."""
    if "://" not in text:
        return text
    parts = [_LOGIN.sub(_without_login, part) for part in _CHAINED.split(text)]
    return _PARAMETER.sub(rf"\1{_MASK}", "".join(parts))


def _without_login(match: re.Match[str]) -> str:
    """An address up to its first `@`, without what stands before that, if it is a login.

    A secret may hold a slash, as Amazon's do: what comes before it is then no host and port.
    """
    scheme, before = match[1], match[2]
    authority = re.split(r"[/?#]", before, maxsplit=1)[0]
    is_in_path = authority != before and _HOST.fullmatch(authority)
    return match[0] if is_in_path else f"{scheme}{_MASK}@"


def has_secret(address: str) -> bool:
    """Whether a secret stands in an address: a password, a key, a signature, a token."""
    return masked(address) != address
