"""ExpertFlow's routing predictor at work: prompts in, routes of their replies out, without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import CheckpointError, ConfigError
from hybrimoe.tracing.learning.learn_routes import TARGET
from hybrimoe.tracing.learning.onnx_net import OnnxNet
from hybrimoe.tracing.record import experts_modules, input_embeddings, num_experts

if TYPE_CHECKING:
    from hybrimoe.generation.batch.generate import BatchPrompt
    from hybrimoe.generation.engine import TextGenerator

__all__ = ["RoutePredictor"]


class RoutePredictor:
    """A net of `hybrimoe trace train --target routes`. Raises CheckpointError for a file that is no such net."""

    def __init__(self, path: Path) -> None:
        self.path, self._net = path, OnnxNet(path)
        if self._net.target != TARGET:
            raise CheckpointError(
                f"{path} predicts {self._net.target!r}, not routes; train one with hybrimoe trace train --target routes"
            )
        facts = self._net.properties
        self.model, self._shape = facts["model"], (int(facts["n_layers"]), int(facts["n_experts"]))

    def routes(self, generator: TextGenerator, prompts: Sequence[BatchPrompt]) -> NDArray[np.float64]:
        """Predicted route vectors of the replies, float64 [n, layers, experts].

        Raises ConfigError where the net was trained for a model of another shape.
        """
        import torch

        experts = experts_modules(generator.model)[1]
        embed, shape = input_embeddings(generator.model), (len(experts), max(num_experts(item) for item in experts))
        means = []
        with torch.inference_mode():
            for prompt in prompts:
                vectors = embed(torch.tensor([prompt.token_ids], device=generator.model.device))
                means.append(vectors[0].float().mean(dim=0).cpu().numpy())
        if (*shape, means[0].size) != (*self._shape, self._net.n_inputs):
            raise ConfigError(
                f"{self.path} was trained for {self.model}: {self._shape[0]} layers of {self._shape[1]} experts,"
                f" embeddings of {self._net.n_inputs}; this model has {shape[0]} layers of {shape[1]}, embeddings of"
                f" {means[0].size}. Record and train with this model"
            )
        return self._net.run(np.array(means)).reshape(-1, *self._shape).astype(np.float64)
