"""The settings of a run: names, defaults, help, limits."""

from agglomerator.config.settings import (
    DESCRIBED,
    FIELDS,
    GROUPS,
    INPUT_SETTINGS,
    LOSS_SETTINGS,
    MODEL_SETTINGS,
    SPLIT_SETTINGS,
    Settings,
    value_types,
)

__all__ = [
    "DESCRIBED",
    "FIELDS",
    "GROUPS",
    "INPUT_SETTINGS",
    "LOSS_SETTINGS",
    "MODEL_SETTINGS",
    "SPLIT_SETTINGS",
    "Settings",
    "value_types",
]
