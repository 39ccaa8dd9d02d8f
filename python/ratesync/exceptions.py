"""The exceptions under the module name that existing code imports; their home is `ratesync.errors`."""

from ratesync.errors import *  # noqa: F403
from ratesync.errors import __all__ as __all__
