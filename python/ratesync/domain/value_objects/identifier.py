"""Identifiers under the module name that existing code imports; their home is `ratesync.identifiers`."""

from ratesync.identifiers import combine_identifiers, hash_identifier

__all__ = ["combine_identifiers", "hash_identifier"]
