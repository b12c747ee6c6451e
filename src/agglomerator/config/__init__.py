"""The settings of a run: names, defaults, help, limits."""

from agglomerator.config.settings import (
    FIELDS,
    INPUT_SETTINGS,
    ISLAND_SETTINGS,
    MODEL_SETTINGS,
    SPLIT_SETTINGS,
    Settings,
    value_types,
)

__all__ = [
    "FIELDS",
    "INPUT_SETTINGS",
    "ISLAND_SETTINGS",
    "MODEL_SETTINGS",
    "SPLIT_SETTINGS",
    "Settings",
    "value_types",
]
