"""``python -m fedpara_plugins.cli``, the same as the command ``fedpara``."""

from __future__ import annotations

import sys

from fedpara_plugins.cli.command import main

sys.exit(main())
