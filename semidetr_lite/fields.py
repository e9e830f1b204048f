"""How settings are declared: types with their ranges, and groups of options.

A group of settings is a frozen dataclass. Its fields are options of the commands (read by tyro)
and entries of config.json (checked by pydantic), both from the same annotation.
"""

from typing import Annotated, TypeVar

import tyro
from pydantic import Field

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
GroupType = TypeVar("GroupType", bound=type)  # a dataclass, which a decorator returns
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

# In files: unknown keys are refused, and so are numbers that are not finite.
STRICT = {"extra": "forbid", "allow_inf_nan": False}


def option_group(group: GroupType) -> GroupType:
    """Class decorator, below `@dataclass`: options of the group are `--field`, not `--group.field`.

    The help still lists them under the name of the group.
    """
    unprefixed = tyro.conf.arg(prefix_name=False)
    kinds = group.__annotations__
    group.__annotations__ = {name: Annotated[kind, unprefixed] for name, kind in kinds.items()}
    return strict_group(group)


def strict_group(group: GroupType) -> GroupType:
    """Class decorator, below `@dataclass`: how pydantic checks the group in a file."""
    group.__pydantic_config__ = STRICT  # type: ignore[attr-defined]  # a new attribute
    return group
