"""The tests' run-time checks of the shapes that signatures name.

pyproject.toml has jaxtyping decorate every function of the package. That costs each call tens of
microseconds, also of a function that names no shape, as the `__torch_function__` that torch calls
for every operation: it was most of the time of most tests. Those functions are left as they are;
mypy checks their types.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for
jaxtyped = jaxtyping.jaxtyped


def jaxtyped_where_shapes(function: Any = None, *, typechecker: Callable) -> Any:
    """`jaxtyping.jaxtyped`, which it replaces, for functions and dataclasses that name shapes."""
    if function is None:
        return partial(jaxtyped_where_shapes, typechecker=typechecker)
    names_shapes = "jaxtyping." in repr(inspect.get_annotations(function))
    return jaxtyped(function, typechecker=typechecker) if names_shapes else function


# jaxtyping imports this module when it decorates the first function of the package.
jaxtyping.jaxtyped = jaxtyped_where_shapes  # type: ignore[assignment]
