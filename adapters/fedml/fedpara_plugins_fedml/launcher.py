"""Runs a project's own start script, unchanged, with the plugin's FedMLRunner in FedML's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fedpara_plugins import ConfigError, FedParaError

__all__ = ["main", "replace_runner"]

USAGE = """usage: python -m fedpara_plugins_fedml main.py --cf fedml_config.yaml ...

Starts main.py as python would, with the same arguments, and FedMLRunner replaced: nothing in the
project is edited. What the plugin does is read from keys fedpara_* of the YAML."""


def replace_runner() -> None:
    """Put the plugin's FedMLRunner everywhere FedML holds its own."""
    import fedpara_plugins_fedml

    FedMLRunner = fedpara_plugins_fedml.FedMLRunner  # noqa: N806  (says so if FedML is missing)
    (original,) = FedMLRunner.__bases__
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fedml" and vars(module).get("FedMLRunner") is original:
            vars(module)["FedMLRunner"] = FedMLRunner


def main(arguments: list[str]) -> int:
    """Run the script that the arguments begin with; the status to exit with.

    Args:
        arguments: of the command line, without the program's name.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)  # noqa: T201
        return 0 if arguments else 2
    script = Path(arguments[0])
    try:
        if not script.is_file():
            raise ConfigError(f"fedpara: there is no file {script} to start")
        replace_runner()
    except FedParaError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")
    return 0
