"""Growing a closed str-Enum by one member. Needs nothing but Python, so that each Python version can be tried alone."""

from __future__ import annotations

from enum import Enum
from typing import Any


def grow(cls: Any, name: str) -> Enum:
    """Add the member `name` with the value `name` to a str-Enum, once; give back the member.

    PEFT keeps its methods in such an Enum and registers only names that are in it. A plain string in its place breaks
    what asks for `.value`. Python has no public way to add a member, so this sets what `EnumType` sets, the same in
    Python 3.11, 3.12 and 3.13.

    Args:
        cls: a class that derives from str and Enum.
        name: the new member's name and value.
    """
    if name in cls.__members__:
        return cls[name]
    member = str.__new__(cls, name)
    member._name_ = member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    type.__setattr__(cls, name, member)
    return member
