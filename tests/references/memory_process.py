"""Ten thousand clients that hold ten thousand different states; prints what the server took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.references import GridDownlink, PerClientDownlink


def resident():
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS")


def main(scheme, folder, clients, memory):
    torch.set_num_threads(1)
    kind = {"per client": PerClientDownlink, "grid": GridDownlink}[scheme]
    downlink = kind(folder=Path(folder), memory_bytes=memory)
    spec = ModelSpec(weights={}, keys=("x", "y"), seed=0)
    codec = parse_codec("delta+quantise:rms=2+zlib")
    draw = torch.Generator().manual_seed(0)
    size = 0
    for client in range(clients):
        # The grid publishes one state for many clients; the other scheme keeps one for each.
        if scheme == "per client" or client % 100 == 0:
            state = {
                "x": torch.randn(50, 20, generator=draw),
                "y": torch.randn(100, generator=draw),
            }
        coded = downlink.encode(str(client), "model", state, spec=spec, codec=codec)
        downlink.acknowledge(str(client), "model", coded.reference)
        if client == 100:
            # Everything that is loaded once is there by now.
            size = resident()
    found = {"states": len(downlink.references), "grown": resident() - size}
    sys.stdout.write(json.dumps(found))
    downlink.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
