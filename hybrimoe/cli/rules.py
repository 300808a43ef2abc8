"""`hybrimoe rules`: check rule files, print their JSON Schema, list and show the shipped ones."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrimoe.cli.shared.deployment import check_rules
from hybrimoe.cli.shared.options import JsonOption
from hybrimoe.cli.views import render
from hybrimoe.text_files import read_text

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Rule file, or the name of a shipped rule set.")]
OnModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Also find its modules in this model (no weights are read)."),
]
DeployOption = Annotated[bool, typer.Option("--deploy", help="The schema of deployment files instead.")]


def register(app: typer.Typer) -> None:
    """Add the command group to the program."""
    group = typer.Typer(no_args_is_help=True, help="Check rule files, or print the JSON Schema of rule files.")
    group.command("check")(check)
    group.command("schema")(schema)
    group.command("list")(list_shipped)
    group.command("show")(show)
    app.add_typer(group, name="rules")


def check(file: FileArgument, model: OnModelOption = None, as_json: JsonOption = False) -> None:
    """Validate a rule file: keys, regular expressions, operators and their arguments; with --model, its matches too."""
    check_rules(file)
    if model is not None:
        from hybrimoe.checkpoint.source import check_model

        check_model(model, weights=False)
    from hybrimoe.injection.rules import read_rules

    bound = read_rules(file)
    result: dict[str, Any] = {"file": bound.source, "ok": True, "rules": len(bound.rules), "remarks": []}
    result["remarks"] = [f"{rule.where()}: {rule.note}" for rule in bound.rules if rule.note]
    if model is not None:
        result |= _check_on_model(file, model)
    if as_json:
        render.emit_json(result)
        return
    for remark in result["remarks"]:
        render.note(remark)
    on_model = "" if model is None else f", {result['modules']} modules and {result['experts']} experts matched"
    render.out().print(f"{bound.source}: ok, {len(bound.rules)} rules{on_model}", markup=False)


def _check_on_model(file: str, model: str) -> dict[str, Any]:
    from hybrimoe.checkpoint.meta import meta_model
    from hybrimoe.cli.shared.opening import quiet_libraries
    from hybrimoe.injection import explain

    quiet_libraries()
    explanation = explain(meta_model(model), file)
    experts = sum(row.n_experts for row in explanation.rows)
    return {"modules": len(explanation.rows), "experts": experts, "remarks": list(explanation.remarks)}


def schema(deploy: DeployOption = False, as_json: JsonOption = True) -> None:
    """Print the JSON Schema of rule files (always JSON), so that an editor can complete and check them."""
    from hybrimoe.config.deploy import json_schema
    from hybrimoe.injection.operators import kwargs_schemas
    from yaml_rules.json_schema import rule_file_schema

    render.emit_json(json_schema() if deploy else rule_file_schema(kwargs_schemas()))


def list_shipped(as_json: JsonOption = False) -> None:
    """List the shipped rule sets and deployment presets with what each is for."""
    from yaml_rules import shipped

    found = [
        {"kind": kind, "name": name, "summary": shipped.summary(kind, name), "path": str(shipped.path_of(kind, name))}
        for kind in ("rules", "deploy")
        for name in shipped.names(kind)
    ]
    if as_json:
        render.emit_json(found)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "name", "summary"):
        table.add_column(column)
    for entry in found:
        table.add_row(entry["kind"], entry["name"], entry["summary"])
    render.out().print(table)


def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print a rule file with all that it extends, in order of precedence; with --json as data."""
    check_rules(file)
    from pathlib import Path

    from hybrimoe.injection.rules import read_rules

    rules = [bound.rule for bound in read_rules(file).rules]
    if as_json:
        render.emit_json([{"rule": rule.where(), **rule.located.data} for rule in rules])
        return
    for source in dict.fromkeys(rule.located.source for rule in rules):
        render.out().print(f"# {source}", style="dim", markup=False)
        render.out().print(read_text(Path(source)), markup=False, soft_wrap=True)
