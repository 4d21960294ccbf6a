"""What a forward computes, recorded, and computed again without the Python of the model around it.

For a CPU what a captured graph is for a GPU: a small model's decode step spends longer in Python than in its matrix
products. A recording is a list of calls; their arguments are what the forward was given, what earlier calls returned,
or the same in every forward. Whether that is so, two recordings of different batches tell: they must be equal.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = TypeVar("Function", bound=Callable[..., Any])

# What a model may decide by, or hand to others than PyTorch, unseen by a recorder.
_READS = frozenset({"__bool__", "__float__", "__index__", "__int__", "data_ptr", "item", "numpy", "tolist"})
_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_SEEN = ("aten", "mkldnn")  # libraries of operators that are over when they return


def one_step(function: Function) -> Function:
    """Make a call of ``function`` one step of a recording, whatever is computed in it.

    It may read tensors' values, and what it is given of a batch, all of which are those of the batch at hand when it
    is computed again. Tensors and batches are arguments, or elements of lists that are.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = _current.recorder
        return function(*args, **kwargs) if recorder is None else recorder.step(function, args, kwargs)

    return call  # type: ignore[return-value]


class Recording:
    """Calls in order. Every value has a place: first those given, then constants and results as they came.

    Attributes:
        obstacle: why it cannot be computed again, where it cannot.
    """

    def __init__(self, given: Sequence[object]) -> None:
        self.obstacle: str | None = None
        self._given = len(given)
        self._steps: list[tuple[Callable[..., Any], tuple[int, ...], tuple[tuple[str, int], ...], int]] = []
        self._constants: dict[int, Any] = {}
        self._literals: set[int] = set()
        self._size = len(given)
        self._blank: list[Any] = []

    def agrees_with(self, other: Recording) -> bool:
        """Whether both do the same with what they are given."""
        return (
            self.obstacle is None
            and self._steps == other._steps
            and self._constants.keys() == other._constants.keys()
            and self._literals == other._literals
            and all(self._agrees_in(place, other) for place in self._constants)
        )

    def _agrees_in(self, place: int, other: Recording) -> bool:
        one, another = self._constants[place], other._constants[place]
        if one is another:
            return True
        if place in self._literals:
            return one.dtype == another.dtype and torch.equal(one, another)
        if type(one) is not type(another) or isinstance(one, torch.Tensor):
            return False
        try:
            return bool(one == another)
        except (RuntimeError, ValueError):  # arrays, or what holds tensors: equal by elements alone
            return False

    def run(self, given: Sequence[object]) -> list[Any]:
        """Compute all again with other values in the places of those given; returns the values of all places."""
        if not self._blank:
            self._blank = [self._constants.get(place) for place in range(self._size)]
        values = self._blank.copy()
        values[: self._given] = given
        for function, args, kwargs, place in self._steps:
            if kwargs:
                values[place] = function(*[values[i] for i in args], **{name: values[i] for name, i in kwargs})
            else:
                values[place] = function(*[values[i] for i in args])
        return values

    def place(self) -> int:
        """A new one."""
        self._size += 1
        return self._size - 1

    def constant(self, value: object) -> int:
        self._constants[place := self.place()] = value
        return place

    def literal(self, tensor: torch.Tensor) -> int:
        """A constant that a forward makes anew of numbers: of the same values in every forward, not the same tensor."""
        self._literals.add(place := self.constant(tensor.clone()))
        return place

    def call(self, function: Callable[..., Any], args: Sequence[int], kwargs: dict[str, int]) -> int:
        """Add a call; returns the place of its result."""
        self._steps.append((function, tuple(args), tuple(kwargs.items()), place := self.place()))
        return place


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is computed while it is entered.

    Args:
        given: what changes from batch to batch: tensors, and objects that only `one_step` functions look into. None
            stands for what this kind of batch does not have.
    """

    def __init__(self, given: Sequence[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(given)
        # By identity: of what is given, and of tensors, which are kept so that no other gets the same.
        self._places = {id(value): place for place, value in enumerate(given) if value is not None}
        self._kept: list[object] = list(given)
        self._watch = _Watch(self)
        self._in_step = False

    def __enter__(self) -> Recorder:
        assert _current.recorder is None, "one at a time"
        _current.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _current.recorder = None
        self._watch.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def place_of(self, result: torch.Tensor) -> int:
        """Where `Recording.run` leaves a result; one that came out of no recorded call cannot be computed again."""
        if id(result) not in self._places:
            self.refuse("what is not recorded")
        return self._place(result)

    def step(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function as one step, with all that it calls."""
        if self._in_step:
            return function(*args, **kwargs)
        self._in_step = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._in_step = False
        self._record(function, args, kwargs, result)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._in_step:
            if func is torch.ops.aten.lift_fresh.default:  # ``torch.tensor(numbers)``
                literal = self.recording.literal(result)
                self._keep(result, lambda: self.recording.call(torch.clone, [literal], {}))
                return result
            if func.namespace not in _SEEN or _depends_on_values(func, args):
                self.refuse(str(func))
            self._record(func, args, kwargs, result)
        return result

    def refuse(self, what: str) -> None:
        """Say that the forward does what cannot be recorded."""
        if not self._in_step:
            self.recording.obstacle = self.recording.obstacle or what

    def _record(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        places = [self._place(value) for value in args], {name: self._place(value) for name, value in kwargs.items()}
        place = self.recording.call(function, *places)
        if isinstance(result, torch.Tensor):
            self._keep(result, lambda: place)
        elif isinstance(result, list | tuple):
            for i, value in enumerate(result):
                if isinstance(value, torch.Tensor):
                    self._keep(value, lambda i=i: self._element(place, i))  # type: ignore[misc]

    def _keep(self, result: torch.Tensor, place: Callable[[], int]) -> None:
        if id(result) not in self._places:  # else it was an argument, written to in place
            self._places[id(result)] = place()
            self._kept.append(result)

    def _element(self, place: int, i: int) -> int:
        return self.recording.call(operator.getitem, (place, self.recording.constant(i)), {})

    def _place(self, value: Any) -> int:
        place = self._places.get(id(value))
        if place is not None:
            return place
        if isinstance(value, torch.Tensor):
            self._kept.append(value)
            self._places[id(value)] = place = self.recording.constant(value)
            return place
        if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
            return self.recording.call(_list, [self._place(each) for each in value], {})
        return self.recording.constant(value)


class _Watch(TorchFunctionMode):
    """Sees what a recorder does not: values of tensors that leave PyTorch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _READS:
            self._recorder.refuse(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Current(threading.local):
    """Of a thread, as PyTorch's modes are: adapters are read beside a forward."""

    recorder: Recorder | None = None


_current = _Current()


def _depends_on_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether what an operator gives, or its shape, is known only by the values of tensors."""
    if func is torch.ops.aten.index.Tensor:  # with numbers of rows it is not
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return any(tag in func.tags for tag in _DEPENDS_ON_VALUES)


def _list(*values: Any) -> list[Any]:
    return list(values)
