"""Subclasses of somebody else's class that have its name and module, and objects of them.

transformers looks classes up by name and module: Trainer to shift labels, recorders to find what they record, loaders
to name an architecture.
"""

from collections.abc import Callable
from typing import Any


def class_of_same_name(own: Any, bases: tuple[type, ...], **attributes: Any) -> Any:
    """A class with the name, the module and the docstring of `own`.

    Args:
        own: somebody else's class.
        bases: of the new class, `own` or a subclass of its base among them.
        attributes: of the new class.
    """
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, bases, {**names, **attributes})


def without_attributes(make: Callable[[Any], Any], own: Any) -> Any:
    """An object of the class that `make` makes of `own`; copying and unpickling bring its attributes.

    Neither can find such a class by its name, which is that of `own`.
    """
    made = make(own)
    return made.__new__(made)
