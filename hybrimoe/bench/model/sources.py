"""Where the models of a benchmark come from: a checkpoint, or random weights in the shape of a real model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hybrimoe.errors import BudgetError, ConfigError, unknown
from yaml_rules import shapes
from yaml_rules.located import read_yaml
from yaml_rules.shapes.derive import N_EXPERTS, TOP_K

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cpu_kernels import ExpertSpec, ExpertWeights
    from hybrimoe.config.deploy import DeployConfig

SEED = 0
WEIGHT_SCALE = 0.02
"""Standard deviation of random weights, the `initializer_range` of most models."""

DISTINCT_EXPERTS = 4
"""Experts that are really drawn; the others are copies at addresses of their own, which cost the same to read."""


class NoTokenizer:
    """Stands where a tokenizer is expected and text is not wanted: every token is without text."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """No token has a text."""
        return ""

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """No text."""
        return ""


class CheckpointSource:
    """The model of a directory, hub id, or (None) of the package."""

    def __init__(self, model: str | None) -> None:
        from hybrimoe.checkpoint.meta import model_config

        self.model = model
        self.tokenizer: Any = NoTokenizer()
        self._config: Any = model_config(model)
        self.vocab_size = int(self._config.get_text_config(decoder=True).vocab_size)

    def plain(self) -> Any:
        """The model as transformers loads it, in the checkpoint's dtype."""
        from transformers import AutoModelForCausalLM

        from hybrimoe.demo import demo_model_path

        path = str(self.model or demo_model_path())
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False).eval()

    def hybrid(self, deployment: DeployConfig, progress: Callable[[int, int, str], None]) -> Any:
        """The model with hybrid experts."""
        from hybrimoe.checkpoint import load

        return load(self.model, config=deployment, progress=progress)


class RandomSource:
    """Random weights in a shipped shape, as a whole or with its first `layers` layers. Nothing is downloaded."""

    def __init__(
        self, shape: str, layers: int | None, n_tokens: int = 0, *, replaced: Mapping[str, int] | None = None
    ) -> None:
        """n_tokens: the context is made longer where it does not hold so many; random weights know no limit.

        replaced: entries of the shape's configuration, and their values in place of its own.
        """
        self.tokenizer: Any = NoTokenizer()
        self.config = _config(shape, layers, replaced or {})
        self.config.max_position_embeddings = max(self.config.max_position_embeddings, n_tokens + 1)
        self.vocab_size = int(self.config.vocab_size)

    def plain(self) -> Any:
        """Transformers' model in bfloat16 with the weights that `hybrid` has."""
        from hybrimoe.checkpoint.meta import meta_model
        from hybrimoe.config.deploy import load_config

        parameters = sum(parameter.numel() for parameter in meta_model(self.config).parameters())
        _require_memory(4 * parameters, "plain transformers in bfloat16, beside the store that it is filled from,")
        model = self.hybrid(load_config({}, accelerator="none", expert_dtype="bfloat16"), lambda *_: None)
        model.hybrimoe.restore()
        return model

    def hybrid(self, deployment: DeployConfig, progress: Callable[[int, int, str], None]) -> Any:
        """The same shape with hybrid experts, its dense layers as the deployment says, in the order of `load`.

        The experts are only ever there in their stored form.
        """
        from hybrimoe.checkpoint.dense import dense_dtype, meta_model
        from hybrimoe.dense.place import place_dense
        from hybrimoe.injection import inject

        model = meta_model(self.config, dense_dtype(deployment.cpu.dense_dtype, self.config))
        injection = inject(model, config=deployment)
        store = injection.session.store
        _require_memory(store.nbytes, f"experts in {injection.session.config.expert_dtype}")
        _fill(injection.session, progress)
        _draw_dense(model)
        place_dense(model, deployment)
        injection.prepare_dense(keep_originals=False)
        injection.session.start()
        model.eval()
        injection.compile_step()
        return model

    def gguf(
        self, path: Path, progress: Callable[[int, int, str], None], change: Callable[[Any], None] = lambda model: None,
        weights: str = "q4_0",
    ) -> None:  # fmt: skip
        """Writes the weights that `hybrid` has as a GGUF file for llama.cpp. change: is given the model first, and may
        set other values of what is not experts. weights, and what is raised: as `write_gguf`."""
        from hybrimoe.bench.model.gguf_file import write_gguf
        from hybrimoe.checkpoint.dense import meta_model
        from hybrimoe.config.deploy import load_config
        from hybrimoe.injection import inject

        model = meta_model(self.config, torch.bfloat16)
        injection = inject(model, config=load_config({}, accelerator="none", expert_dtype="int4"))
        layer = injection.session.layer_specs()[0]
        injection.session.close()  # its store was never written to: it took no memory
        _draw_dense(model)
        change(model)
        generator = torch.Generator().manual_seed(SEED)
        drawn = [_random_expert(layer.spec, generator) for _ in range(min(DISTINCT_EXPERTS, layer.num_experts))]
        which = [expert % len(drawn) for expert in range(layer.num_experts)]
        parts = {part: [getattr(expert, part) for expert in drawn] for part in ("gate", "up", "down")}
        experts = {part: (torch.stack(matrices), which) for part, matrices in parts.items() if matrices[0] is not None}
        write_gguf(path, self.config, dict(model.named_parameters()), experts, progress, weights)


def other_experts(shape: str, experts: int | None, active: int | None) -> dict[str, int]:
    """What a shape's configuration calls the number of its experts and of those that a token takes, with other values;
    without those that are None. Raises ConfigError for a token that would take more experts than there are."""
    config = read_yaml(shapes.FOLDER / f"{shape}.yaml").data["config"]
    names = {n: next(name for name in known if name in config) for n, known in ((0, N_EXPERTS), (1, TOP_K))}
    replaced = {names[n]: value for n, value in enumerate((experts, active)) if value is not None}
    there_are, taken = (int({**config, **replaced}[names[n]]) for n in (0, 1))
    if taken > there_are:
        raise ConfigError(f"a token cannot take {taken} of {there_are} experts: lower --active, or raise --experts")
    return replaced


def _draw_dense(model: Any) -> None:
    """Gives an injected model on the meta device the random weights of all that is not experts."""
    from hybrimoe.checkpoint.reading import new_weight

    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data = new_weight(weight.shape, weight.dtype)  # as those of a checkpoint
    torch.manual_seed(SEED)
    model.init_weights()
    model.tie_weights()


def _config(shape: str, layers: int | None, replaced: Mapping[str, int]) -> Any:
    """The transformers configuration of a shape. Raises ConfigError for what cannot be."""
    from transformers import AutoConfig

    from hybrimoe.checkpoint.config_numbers import check_config

    if shape not in shapes.shape_names():
        raise ConfigError(unknown("model shape", shape, shapes.shape_names()))
    data = read_yaml(shapes.FOLDER / f"{shape}.yaml").data
    settings: dict[str, Any] = {**data["config"], **replaced}
    if layers is not None:
        whole = int(settings["num_hidden_layers"])
        if not 1 <= layers <= whole:
            raise ConfigError(f"--layers must be between 1 and {whole} for {shape}, found {layers}")
        settings["num_hidden_layers"] = layers
    config = AutoConfig.for_model(settings.pop("model_type"), dtype="bfloat16", **settings)
    check_config(shape, config)
    return config


def _fill(session: Any, progress: Callable[[int, int, str], None]) -> None:
    """Write random experts into every record of the session's store."""
    generator = torch.Generator().manual_seed(SEED)
    specs = session.layer_specs()
    total = sum(layer.num_experts for layer in specs)
    done = 0
    drawn: dict[ExpertSpec, list[Any]] = {}
    for index, layer in enumerate(specs):
        for expert in range(layer.num_experts):
            records = drawn.setdefault(layer.spec, [])
            if len(records) < DISTINCT_EXPERTS:
                session.store.write(index, expert, _random_expert(layer.spec, generator))
                records.append(session.store.record(index, expert))
            else:
                session.store.record(index, expert)[:] = records[expert % DISTINCT_EXPERTS]
            done += 1
            progress(done, total, "random experts")


def _random_expert(spec: ExpertSpec, generator: torch.Generator) -> ExpertWeights:
    from cpu_kernels import ExpertWeights

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * WEIGHT_SCALE

    gated, biased = spec.activation.gated, spec.has_bias
    return ExpertWeights(
        up=matrix(spec.inter, spec.hidden),
        down=matrix(spec.hidden, spec.inter),
        gate=matrix(spec.inter, spec.hidden) if gated else None,
        gate_bias=matrix(spec.inter) if gated and biased else None,
        up_bias=matrix(spec.inter) if biased else None,
        down_bias=matrix(spec.hidden) if biased else None,
    )


def _require_memory(n_bytes: int, what: str) -> None:
    from hybrimoe.machine.memory import available_bytes

    available = available_bytes()
    if n_bytes > available:
        gib = 2**30
        raise BudgetError(
            f"{what} needs {n_bytes / gib:.1f} GiB and {available / gib:.1f} GiB are free: fewer --layers, "
            f"a smaller --dtype, or fewer contenders at once"
        )
