"""HTML and SVG by functions: what is not markup is escaped, always."""

from __future__ import annotations

from html import escape

Attribute = str | int | float | bool | None


class Markup(str):
    """A piece of finished HTML or SVG."""

    __slots__ = ()


Child = Markup | str | int | float | None

_VOID = frozenset({"img", "meta", "br"})


def tag(element: str, *children: Child, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        element: its name.
        children: `Markup` goes in as it is, anything else as escaped text; None is left out.
        attributes: by name, `_` for `-` and a trailing `_` dropped (`class_`); None and False are left out.
    """
    pairs = [
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    ]
    start = f"<{element}{''.join(pairs)}>"
    return Markup(start if element in _VOID else f"{start}{join(*children)}</{element}>")


def join(*children: Child) -> Markup:
    """Return pieces one after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child), quote=False)
            for child in children
            if child is not None
        )
    )
