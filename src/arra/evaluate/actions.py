"""`arra evaluate ACTION`: what each action is asked with, and what it tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arra.evaluate import comparison, prompt_sets, sweep_results
from arra.evaluate.comparison import CompareConfig
from arra.evaluate.prompt_sets import ArrangeConfig, ScoredConfig
from arra.evaluate.sweep import SweepConfig, sweep


@dataclass(frozen=True)
class Action:
    """An action of the command line.

    Attributes:
        config: dataclass of its options.
        run: config -> what the terminal is told.
    """

    config: type
    run: Callable[[Any], str]


def _scored(config: ScoredConfig) -> str:
    return prompt_sets.told(prompt_sets.read_scored(config))


def _compare(config: CompareConfig) -> str:
    return comparison.told(comparison.compare(config))


def _sweep(config: SweepConfig) -> str:
    return sweep_results.told(sweep(config))


ACTIONS = {
    "arrange": Action(ArrangeConfig, prompt_sets.arrange),
    "compare": Action(CompareConfig, _compare),
    "scored": Action(ScoredConfig, _scored),
    "sweep": Action(SweepConfig, _sweep),
}
