"""A launcher that runs a project's unchanged start script with the plugin's FedMLRunner."""

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
    """Replace FedML's FedMLRunner by the plugin's in all modules of FedML.

    Raises:
        PluginError: if FedML is missing or does not import.
    """
    import fedpara_plugins_fedml

    runner = fedpara_plugins_fedml.FedMLRunner
    from fedpara_plugins_fedml.seams import modules_with_runner  # now FedML is known to import

    (original,) = runner.__bases__
    for module in modules_with_runner(original):
        setattr(module, original.__name__, runner)


def main(arguments: list[str]) -> int:
    """Run the script that the first argument names, and return the exit status.

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
