"""Servers to be killed: run as a program, it forks one for every line ``start`` on its input.

A forked server reads lines of JSON and answers each with one line, until it is killed; the program
then says ``dead``. Forking makes a start cheap, since torch is imported once.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.references import GridDownlink, PerClientDownlink

SCHEMES = {"per client": PerClientDownlink, "grid": GridDownlink}


def content(number):
    """The server's model after so many rounds, the same in every process."""
    torch.manual_seed(0)
    model = fedpara.convert(nn.Sequential(nn.Linear(48, 40)), gamma=0.1, init="seeded")
    draw = torch.Generator().manual_seed(number)
    state = {
        name: value + 0.01 * number * torch.randn(value.shape, generator=draw)
        for name, value in model.state_dict().items()
    }
    return fedpara.ModelSpec.of(model), state


def read_line():
    """One line, nothing read ahead: what is left belongs to the next server."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(0)
        line += byte
    return line.decode().strip()


def say(**answer):
    os.write(1, (json.dumps(answer) + "\n").encode())


def serve(scheme, folder):
    """Answer until killed."""
    downlink = SCHEMES[scheme](folder=Path(folder), memory_bytes=10_000)
    codec = parse_codec("delta+quantise:rms=2+zlib")
    say(ready=os.getpid())
    while True:
        order = json.loads(read_line())
        if order["do"] == "encode":
            spec, state = content(order["number"])
            coded = downlink.encode(order["client"], "model", state, spec=spec, codec=codec)
            text = base64.b64encode(coded.payload).decode()
            say(payload=text, reference=coded.reference, kind=coded.kind)
        elif order["do"] == "refused":
            downlink.refused(order["client"], "model", order["holds"])
            say(done=True)
        else:
            downlink.acknowledge(order["client"], "model", order["held"])
            say(known=order["held"] in downlink.references)


def main():
    torch.set_num_threads(1)
    while True:
        order = read_line()
        if not order.startswith("start "):
            continue  # meant for a server that is dead
        scheme, folder = json.loads(order.removeprefix("start "))
        child = os.fork()
        if child == 0:
            serve(scheme, folder)
        os.waitpid(child, 0)
        os.write(1, b"\ndead\n")


if __name__ == "__main__":
    main()
