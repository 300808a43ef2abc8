"""Tokens a second of decoding and of a prompt at several shares of slots, beside transformers and llama.cpp."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from cpu_kernels.host.threads import resolve_threads
from hybrimoe.bench import rounds
from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.bench.model import contenders
from hybrimoe.dense.place import dense_device, move

DTYPE = "int4"
TRIAL_TOKENS = 2
BY_PYTHON = ", Python between the pieces"
ALL_LAYERS = -1
"""llama.cpp's word for all layers on the device, where it is built for one."""


def run(setting: Setting, findings: Findings) -> None:
    """Alternating rounds of all contenders: decode first, then prompts."""
    until = time.monotonic() + setting.limit_s
    ids = models.prompt(setting)
    with contenders.all_open(_openers(setting, findings)) as everyone:
        opened = _those_that_run(findings, everyone, ids)
        cosines = contenders.check_parity(opened, ids)
        subjects = {contender.label: contender for contender in opened}
        long = models.prompt(setting, setting.long_prompt_tokens)
        measures: dict[str, Callable[[Any], float]] = {
            f"decode after {len(ids)} tokens": lambda it: it.decode(ids, setting.speed_tokens),
            f"prompt of {len(ids)} tokens": lambda it: it.prefill(ids),
            f"prompt of {len(long)} tokens": lambda it: it.prefill(long),
        }
        for number, (what, measure) in enumerate(measures.items()):
            for contender in opened:
                contender.counters.clear()
            now = time.monotonic()
            enough = now + (until - now) / (len(measures) - number + 1)
            values = rounds.alternate(subjects, measure, setting.rounds, until=enough)
            plain = median(values[opened[0].label])
            for contender in opened:
                _row(findings, what, contender, values[contender.label], plain, setting, cosines)
        for contender in opened:
            if contender.counters:
                _profile(findings, contender, ids, setting)


def _those_that_run(findings: Findings, opened: list[Any], ids: list[int]) -> list[Any]:
    """The contenders that can decode; of each other one a problem."""
    running = []
    for contender in opened:
        with findings.part(contender.label):
            contender.decode(ids, TRIAL_TOKENS)
            running.append(contender)
    return running


def _profile(findings: Findings, contender: Any, ids: list[int], setting: Setting) -> None:
    """Where the time of a decode step goes, as `--profile` tells it."""
    decode = contender.profile(ids, setting.speed_tokens)["decode"]
    tokens = max(1, decode["tokens"])
    parts = {part: round(us / tokens, 1) for part, us in decode["parts_us"].items() if us}
    findings.row(
        "us of a decode step, by part", contender=contender.label, all=round(decode["us"] / tokens, 1), **parts
    )


def _row(
    findings: Findings, what: str, contender: Any, values: list[float], plain: float, setting: Setting,
    cosines: dict[str, float],
) -> None:  # fmt: skip
    told = rounds.spread(values)
    activated = sum(counters["activated"] for counters in contender.counters)
    hits = sum(counters["hits"] for counters in contender.counters)
    findings.row(
        what, contender=contender.label, tokens_per_s=round(told["median"], 1),
        spread=f"{told['min']:.1f}-{told['max']:.1f}", beside_transformers=round(told["median"] / plain, 2),
        us_a_token_and_layer=round(1e6 / told["median"] / setting.speed_layers, 1),
        hit_rate=round(hits / activated, 3) if activated and hits else None,
        logits_cosine=None if contender.label not in cosines else round(cosines[contender.label], 4),
        rounds=len(values),
    )  # fmt: skip


def _openers(setting: Setting, findings: Findings) -> list[Callable[[ExitStack], Any]]:
    source = models.source(setting, setting.speed_layers)
    findings.remark(
        f"{setting.shape}, {setting.speed_layers} layers, random weights: routing is nearly uniform, so hits are those"
        f" of chance; experts {DTYPE} in the hybrid models, bfloat16 in transformers"
    )
    openers: list[Callable[[ExitStack], Any]] = [partial(_plain, setting, source)]
    cases = [(share, "auto", "") for share in setting.speed_shares]
    for share, step, more in [*cases, *_otherwise(setting)]:
        deployment = models.deployment(setting.accelerator, DTYPE, "ours", share, step=step)
        make = partial(source.hybrid, deployment, lambda *_: None)
        openers.append(partial(_hybrid, f"hybrid, {share:.0%} slots{more}", make, source.tokenizer, more == BY_PYTHON))
    if all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        openers.append(partial(_llama_cpp, setting, source))
    else:
        findings.remark("llama.cpp is not beside it: llama-cpp-python or gguf is not installed")
    return openers


def _otherwise(setting: Setting) -> list[tuple[float, str, str]]:
    """What captured steps bring: the largest share once more without them; and what it brings that one compiled call
    runs them: a share with which host and card divide the experts, by Python."""
    if setting.emulated:
        return []
    divided = [share for share in setting.speed_shares if 0.0 < share < 1.0]
    return [
        (setting.speed_shares[-1], "transformers", ", steps not captured"),
        *((share, "auto", BY_PYTHON) for share in divided[:1]),
    ]


def _plain(setting: Setting, source: Any, stack: ExitStack) -> contenders.Contender:
    model = source.plain()
    device = dense_device(models.deployment(setting.accelerator, DTYPE, "ours", 0.0))
    if device is not None:
        move(model, device)
    return contenders.plain("transformers", model, source.tokenizer)


def _hybrid(
    label: str, make: Callable[[], Any], tokenizer: Any, by_python: bool, stack: ExitStack
) -> contenders.Contender:
    with models.python_between_pieces(by_python):
        return stack.enter_context(contenders.hybrid(label, make, tokenizer))


def _llama_cpp(setting: Setting, source: Any, stack: ExitStack) -> contenders.LlamaCpp:
    path = Path(stack.enter_context(TemporaryDirectory(prefix="hybrimoe-"))) / "model.gguf"
    source.gguf(path, lambda *_: None)
    n_tokens = setting.long_prompt_tokens + setting.speed_tokens
    return contenders.LlamaCpp(str(path), resolve_threads(None), n_tokens, device_layers=ALL_LAYERS)
