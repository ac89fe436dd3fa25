"""Options of a mechanism: one frozen dataclass each, checked once, when it is made.

A mechanism's dataclass derives from `Options`, gives every field a default, and checks values in `check` with the
helpers below. Field names are fixed: published checkpoints store them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from hf_attn.errors import InvalidOption, near

OptionsT = TypeVar("OptionsT", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class of every mechanism's options. `mechanism` is the registered name, for messages."""

    mechanism: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `InvalidOption` for a value outside its rule. The base class has nothing to check."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def parse(cls: type[OptionsT], **values: Any) -> OptionsT:
        """Options from keywords; an unknown keyword is an `InvalidOption` that names the nearest one."""
        for name in values:
            if name not in cls.names():
                known = ", ".join(cls.names()) or "none"
                raise InvalidOption(
                    f"{cls.mechanism}: unknown option {name!r}{near(name, cls.names())}. Its options: {known}."
                )
        return cls(**values)

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def refuse(self, option: str, rule: str, remedy: str = "") -> InvalidOption:
        """The error for `option`, with its value; the caller raises it."""
        value = getattr(self, option)
        return InvalidOption(f"{self.mechanism}: option {option}={value!r} {rule}.{' ' + remedy if remedy else ''}")

    def one_of(self, option: str, *allowed: str) -> None:
        if getattr(self, option) not in allowed:
            raise self.refuse(
                option, f"must be one of {', '.join(map(repr, allowed))}{near(getattr(self, option), allowed)}"
            )

    def integer(self, option: str, minimum: int) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(option, f"must be an integer of at least {minimum}")

    def number(self, option: str, minimum: float, maximum: float = float("inf")) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
            raise self.refuse(option, f"must be a number from {minimum} to {maximum}")

    def boolean(self, *options: str) -> None:
        for option in options:
            if not isinstance(getattr(self, option), bool):
                raise self.refuse(option, "must be True or False")
