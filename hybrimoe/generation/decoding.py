"""Ways of decoding that a model's generation_config.json may ask for and a streamed reply does not follow."""

from __future__ import annotations

import warnings
from typing import Any

PLAIN = {"num_beams": 1, "num_return_sequences": 1}
"""Fields that say how many sequences are searched or returned, with what a streamed reply does."""
UNSUPPORTED = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids")
"""Fields that choose another way of decoding where they are set."""


class GenerationConfigWarning(UserWarning):
    """A field of generation_config.json that replies do not follow."""


def other_decoding(generation_config: Any) -> dict[str, Any]:
    """The fields of a generation config that ask for another decoding than choosing or drawing token by token."""
    found = {name: getattr(generation_config, name, None) for name in (*PLAIN, *UNSUPPORTED)}
    return {name: value for name, value in found.items() if value and value != PLAIN.get(name)}


def warn_of_other_decoding(model: Any) -> None:
    """Warns with GenerationConfigWarning where replies will not be what the model's configuration asks for."""
    fields = other_decoding(getattr(model, "generation_config", None))
    if fields:
        listed = ", ".join(f"{name} {value}" for name, value in fields.items())
        warnings.warn(
            GenerationConfigWarning(
                f"the model's generation_config.json asks for {listed}; streamed replies choose one token at a time,"
                " greedily or by sampling. model.generate follows it"
            ),
            stacklevel=3,
        )
