"""Griffe extension: doctests under `Example:` become code, and `acquire` gets the compiled docstring.

Griffe knows `Examples:` only in the plural, and reads signatures of the compiled module from its stub,
where there are no docstrings.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Both corrections, once a package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        from ratesync import _core

        core = pkg["_core"]
        if "acquire" not in core.members:  # a stub has overloads only, which griffe keeps elsewhere
            shown, several, *_ = core.overloads["acquire"]
            shown.overloads = [several]
            # The docstring describes both forms.
            if "more" not in shown.parameters:
                shown.parameters.add(several.parameters["more"])
            core.set_member("acquire", shown)
        function = core["acquire"]
        if function.docstring is None:
            text = inspect.getdoc(_core.acquire) or ""
            # The builtin's first lines are its signature, up to "--", where Python has not cut them off.
            function.docstring = griffe.Docstring(text.partition("\n--\n\n")[2] or text, parent=function)
        _rename(pkg)


def _rename(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
    for member in obj.members.values():
        if not member.is_alias:
            _rename(member)  # type: ignore[arg-type]
