"""Identifiers for keys: hashing personal data away, and joining several parts."""

from __future__ import annotations

import logging

__all__ = ["combine_identifiers", "hash_identifier"]

_ALGORITHMS = ("sha256", "sha384", "sha512", "md5")


def hash_identifier(identifier: str, *, length: int = 16, salt: str = "", algorithm: str = "sha256") -> str:
    """A short hexadecimal stand-in for an e-mail address, an IP address or a token.

    Args:
        identifier: lower-cased and stripped before hashing, so that spelling variants meet.
        length: hexadecimal digits of the result; more than the digest has gives the whole digest.
        salt: put before the identifier with a colon; keep it secret where identifiers can be guessed.
        algorithm: sha256, sha384, sha512 or md5; any other name is logged and means sha256.

    Example:
        >>> hash_identifier(" Ada@Example.org ") == hash_identifier("ada@example.org")
        True
        >>> len(hash_identifier("ada@example.org", length=24))
        24
    """
    import hashlib

    if algorithm not in _ALGORITHMS:
        logging.getLogger("ratesync").warning(
            "hash_identifier: %r is not one of %s; sha256 is used", algorithm, ", ".join(_ALGORITHMS)
        )
        algorithm = "sha256"
    text = identifier.lower().strip()
    if salt:
        text = f"{salt}:{text}"
    return hashlib.new(algorithm, text.encode("utf-8"), usedforsecurity=False).hexdigest()[:length]


def combine_identifiers(*identifiers: object, separator: str = ":") -> str:
    """The parts that are not empty (None, "", 0 are), as strings, joined.

    Example:
        >>> combine_identifiers("tenant", None, 7)
        'tenant:7'
    """
    return separator.join(str(part) for part in identifiers if part)
