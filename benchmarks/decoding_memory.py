"""Memory and time that decoding takes, by codec, for one large tensor and for a whole model.

    python benchmarks/decoding_memory.py [--megabytes 200] [--runs 3]

Prints Markdown. Every payload is decoded in a process of its own, with the tensors' own bytes as
limit. ``memory`` is the growth of the process's peak, the decoded tensors included and the received
bytes not, in multiples of the tensors' bytes; the same without the reference, which both sides hold
anyway.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fedpara_plugins.codecs import decoders, encode_payload, parse_codec, reference_hash

CODECS = (
    *("none", "lossless", "int8", "balanced", "small", "tiny"),
    *(
        "zlib",
        "zstd",
        "ans",
        "planes",
        "planes+zlib",
        "grid+ans",
        "cast",
        "delta+cast:to=fp16+zlib",
    ),
    *("delta+topk:share=0.1+zlib", "delta+topk:share=0.7+zlib", "topk:share=0.7"),
    *("quantise:bits=4,scope=row+ans", "quantise:bits=4,scope=block,block=16+zlib"),
    *("quantise:bits=16+zlib", "delta+int8", "delta"),
)
SHAPES = ((512, 512, 3, 3), (4096, 2048), (1000, 512), (512,), (256, 128, 3, 3))

WATCH = """
import pickle, sys, time
import torch
torch.set_num_threads(1)
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
with open(sys.argv[1], "rb") as file:
    data, reference, digest, limit = pickle.load(file)
def status(key):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
zeros = {"w": torch.zeros(9, 4)}
for codec in ("small", "lossless", "topk:share=0.1", "quantise:scope=row+ans"):  # lazy imports
    packed = encode_payload({"w": torch.rand(9, 4)}, codec=parse_codec(codec), reference=zeros)
    decode_payload(packed, limit=10**4, reference=zeros)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before, start = status("VmRSS"), time.process_time()
decode_payload(data, limit=limit, references={digest: reference})
print((status("VmHWM") - before) / limit, time.process_time() - start)
"""


def states(megabytes: int) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Return pairs of a trained state and its reference."""
    draw = torch.Generator().manual_seed(0)
    values = megabytes * 250_000
    large = {"w": torch.randn(values // 1000, 1000, generator=draw)}
    model = {f"{i}": torch.randn(SHAPES[i % len(SHAPES)], generator=draw) for i in range(10)}
    found = {}
    for name, state in {"one tensor": large, "model": model}.items():
        found[name] = (_moved(state, draw), state)
        halves = {key: value.half() for key, value in state.items()}
        found[f"{name}, float16"] = (_moved(halves, draw), halves)
    return found


def _moved(state: dict[str, torch.Tensor], draw: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        key: value + 0.03 * torch.randn(value.shape, generator=draw).to(value.dtype)
        for key, value in state.items()
    }


def measure(
    codec: str, state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], folder: Path
) -> tuple[float, float]:
    """Return the peak in multiples of the tensors' bytes, and seconds."""
    if codec.startswith("grid"):
        state, reference = (
            {key: ((value * 64).round() / 64).to(value.dtype) for key, value in one.items()}
            for one in (state, reference)
        )
    chain = parse_codec(codec).resolved(decoders())
    digest = reference_hash(reference)
    data = encode_payload(state, codec=chain, reference=reference, digest=digest)
    size = sum(value.nbytes for value in state.values())
    path = folder / "payload.pickle"
    path.write_bytes(pickle.dumps((data, reference, digest, size)))
    del data
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(path)],
        capture_output=True,
        check=True,
        # glibc would keep what was freed, and the next allocation would find it for nothing.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    times, seconds = map(float, done.stdout.split())
    return times, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = states(options.megabytes)
    print("| codec | " + " | ".join(f"{name}: memory, ms per MiB" for name in found) + " |")
    print("|---|" + "---|" * len(found))
    with tempfile.TemporaryDirectory() as folder:
        for codec in options.codecs:
            cells = []
            for state, reference in found.values():
                size = sum(value.nbytes for value in state.values()) / 2**20
                runs = [measure(codec, state, reference, Path(folder)) for _ in range(options.runs)]
                times, seconds = (min(values) for values in zip(*runs, strict=True))
                cells.append(f"{times:.2f}, {1e3 * seconds / size:.1f}")
            print(f"| `{codec}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
