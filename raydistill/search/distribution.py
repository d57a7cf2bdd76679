"""The values of one key of a search space: a range, a list of choices, or a fixed value."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field, model_validator

from raydistill.config import Section

Bounds = tuple[float, float]
# A study stores the number that a trial drew, or the label of its choice.
Choice = float | int | str | bool | None


class Distribution(Section):
    """The values of one key: exactly one kind, with `step` and `when` if they fit it."""

    float_range: Annotated[Bounds | None, Field(alias="float")] = None
    log_range: Annotated[Bounds | None, Field(alias="log")] = None
    int_range: Annotated[tuple[int, int] | None, Field(alias="int")] = None
    categorical: Annotated[tuple[Any, ...] | dict[str, Any] | None, Field(min_length=1, max_length=1000)] = None
    fixed: Any = None
    step: Annotated[float, Field(gt=0)] | None = None
    when: Annotated[dict[str, Any], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _one_kind(self) -> Distribution:
        kinds = self.model_fields_set - {"step", "when"}
        if len(kinds) != 1:
            raise ValueError("give one of float, log, int, categorical and fixed")
        (kind,) = kinds
        if kind != "fixed" and getattr(self, kind) is None:
            needed = "a list of choices" if kind == "categorical" else "two bounds, the lower one first"
            raise ValueError(f"{kind.removesuffix('_range')} needs {needed}")
        limits = self.float_range or self.log_range or self.int_range
        if limits and limits[0] >= limits[1]:
            raise ValueError(f"[{limits[0]:g}, {limits[1]:g}] is empty; the lower bound comes first")
        if self.log_range and self.log_range[0] <= 0:
            raise ValueError("log needs bounds above 0")
        if self.step is not None and not (self.float_range or self.int_range):
            raise ValueError("step goes with float and int")
        if self.int_range and self.step is not None and self.step != int(self.step):
            raise ValueError("the step of an int is a whole number")
        return self

    @property
    def is_fixed(self) -> bool:
        return "fixed" in self.model_fields_set

    @property
    def choices(self) -> dict[Choice, Any]:
        """The values of `categorical` by label. The label of a list or mapping is its JSON."""
        if isinstance(self.categorical, dict):
            return dict(self.categorical.items())
        plain = (str, int, float, bool, type(None))
        return {v if isinstance(v, plain) else json.dumps(v): v for v in self.categorical or ()}

    def draw(self, key: str, trial: Any) -> Choice:
        """Ask Optuna's trial for a value or a label."""
        drawn: Choice
        if self.categorical is not None:
            return trial.suggest_categorical(key, list(self.choices))
        if self.int_range is not None:
            drawn = trial.suggest_int(key, self._at(0), self._at(self._num_steps), step=int(self.step or 1))
        elif self.log_range is not None:
            drawn = trial.suggest_float(key, *self.log_range, log=True)
        elif self.step is not None:
            drawn = trial.suggest_float(key, self._at(0), self._at(self._num_steps), step=self.step)
        else:
            assert self.float_range is not None
            drawn = trial.suggest_float(key, *self.float_range)
        return self.exact(drawn)

    def exact(self, drawn: Choice) -> Choice:
        """The listed value nearest to a number: samplers add steps in floats, and 0.30000000000000004 has to become
        the 0.3 that earlier stages ran for."""
        if not self._has_steps or not isinstance(drawn, int | float):
            return drawn
        return self._at(round((drawn - self._limits[0]) / (self.step or 1)))

    def ends(self) -> list[Choice]:
        """The values to check: if the config accepts them, it accepts all between."""
        if self.categorical is not None:
            return list(self.choices)
        if self.is_fixed:
            return []
        return [self._at(0), self._at(self._num_steps)] if self._has_steps else list(self._limits)

    def values(self) -> list[Choice] | None:
        """All values or labels; None if there are infinitely many."""
        if self.categorical is not None:
            return list(self.choices)
        return [self._at(k) for k in range(self._num_steps + 1)] if self._has_steps else None

    @property
    def num_values(self) -> float:
        if self.categorical is not None:
            return len(self.choices)
        return self._num_steps + 1 if self._has_steps else math.inf

    def holds(self, value: Any) -> bool:
        """Whether a config's own value lies in a range, and on its steps."""
        if self.is_fixed or self.categorical is not None:
            return False
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low, high = self._limits
        if not low <= value <= high or (self.int_range and value != int(value)):
            return False
        steps = (value - low) / (self.step or 1) if self._has_steps else 0.0
        return abs(steps - round(steps)) < 1e-9

    @property
    def _limits(self) -> Bounds:
        limits = self.float_range or self.log_range or self.int_range
        assert limits is not None, "neither categorical nor fixed"
        return limits

    @property
    def _has_steps(self) -> bool:
        return self.int_range is not None or (self.float_range is not None and self.step is not None)

    @property
    def _num_steps(self) -> int:
        low, high = (Fraction(str(end)) for end in self._limits)
        return int((high - low) // Fraction(str(self.step or 1)))

    def _at(self, index: int) -> int | float:
        """The value `index` steps above the lowest, in decimals, like Optuna's highest."""
        value = Decimal(str(self._limits[0])) + index * Decimal(str(self.step or 1))
        return int(value) if self.int_range else float(value)
