"""Griffe extension: signatures show values and types, not the names they have in the code.

`head_dims: Sequence[int] = PAPER_HEAD_DIMS` reads `= (512, 1024, 1536, 2048)`, and `Schedule` reads
`float | Callable[[int], float]`.
"""

from __future__ import annotations

from typing import Any

import griffe

SHORT = 60  # characters; a longer value, such as a class, keeps its name


class Resolved(griffe.Extension):
    """Replaces names of module-level constants in the parameters of every function."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """After a package is loaded, when every name leads somewhere."""
        self._visit(pkg)

    def _visit(self, where: griffe.Object) -> None:
        for member in where.members.values():
            if member.is_alias:
                continue
            if member.is_function:
                for parameter in member.parameters:
                    parameter.default = self._resolved(parameter.default, member)
                    parameter.annotation = self._resolved(parameter.annotation, member)
            else:
                self._visit(member)

    def _resolved(self, value: Any, function: griffe.Function) -> Any:
        """The constant's value where a parameter's default or annotation is its bare name."""
        if not isinstance(value, griffe.ExprName):
            return value
        try:
            found = function.modules_collection[value.canonical_path]
            target = found.final_target if found.is_alias else found
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            return value
        is_short = target.is_attribute and target.value and len(str(target.value)) <= SHORT
        return target.value if is_short else value
