"""The one form in which a setting is refused."""

from typing import Any


def require(section: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise ValueError "name = value: must be allowed" unless the condition holds."""
    if not holds:
        value = getattr(section, name)
        shown = value if value != "" else '""'
        raise ValueError(f"{name} = {shown}: must be {allowed}")
