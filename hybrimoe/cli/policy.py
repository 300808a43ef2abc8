"""`hybrimoe policy`: which scheduling policies there are, and whether one of your own keeps the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from hybrimoe.extensions.check import Checked


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    group = typer.Typer(no_args_is_help=True, help="List scheduling policies, or check one of your own.")
    group.command("list")(list_policies)
    group.command("check")(check)
    app.add_typer(group, name="policy")


def list_policies(as_json: JsonOption = False) -> None:
    """List all presets: their parts, their parameters, and where they come from; entry points that fail are named."""
    from hybrimoe.extensions.policies import load_entry_points
    from scheduler.extension import extensions
    from scheduler.planner.policies import POLICIES, policy_parameters

    failed = load_entry_points()
    files = {entry.name: entry.file for entry in extensions()}
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "parts": policy.name,
            "source": files.get(name, "hybrimoe"),
            "parameters": {
                key: {"expected": known.expected, "default": policy.params.get(key, known.default)}
                for key, known in policy_parameters(policy).items()
            },
        }
        for name, policy in POLICIES.items()
    ]
    if as_json:
        render.emit_json({"policies": found, "failed": [str(failure) for failure in failed]})
        return
    for failure in failed:
        render.note(str(failure))
    cells = [(entry["name"], entry["parts"], entry["source"], _told(entry["parameters"])) for entry in found]
    columns = ("policy", "balance/prefetch/cache", "from", "parameters")
    render.out().print(render.table("Policies", columns, cells))


def _told(parameters: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name}={known['default']}" for name, known in parameters.items())


def check(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A file such as mine.py (all its policies), or a name.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Let small planners of a policy live through prefill and decode, and look at every plan.

    Exit code 1 names the first plan that breaks the contract: an expert that runs twice or not at all, a slot that is
    read before its bytes are there, a prefetch of what is resident, a score that is no number, a decision that differs
    between equal runs, or an error that the policy raised.
    """
    from hybrimoe.extensions.check import check_policy
    from hybrimoe.extensions.policies import FILE_SPEC, load_file, open_policy

    texts = [policy]
    found = FILE_SPEC.fullmatch(policy)
    if found is not None and found["name"] is None and found["rest"] is None:
        texts = [f"{policy}::{entry.name}" for entry in load_file(Path(policy).expanduser())]
    checked = [check_policy(open_policy(text)) for text in texts]
    if as_json:
        render.emit_json(checked)
        return
    for one in checked:
        render.out().print(_sentence(one), markup=False, soft_wrap=True)


def _sentence(checked: Checked) -> str:
    return (
        f"{checked.name}: ok, {checked.plans} plans of {checked.planners} planners, {checked.transfers} transfers, "
        f"{checked.prefetches} prefetches; {checked.decision_us:.0f} us a decision (measured, median)"
    )
