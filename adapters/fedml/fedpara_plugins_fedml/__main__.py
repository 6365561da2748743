"""``python -m fedpara_plugins_fedml main.py --cf fedml_config.yaml``: see `launcher`."""

from __future__ import annotations

import sys

from fedpara_plugins_fedml.launcher import main

sys.exit(main(sys.argv[1:]))
