"""Sizes, errors and speeds of codecs on an update of trained factors of VGG16 at gamma 0.1.

    python benchmarks/vgg16_update.py --data FOLDER --output update.pt
    python benchmarks/codecs.py --update update.pt [--plot docs/records/codecs.png]

Prints Markdown. Without ``--update``, ``--synthetic`` takes normal noise for the update, whose
sizes are near the real ones and whose errors in composed weights mean nothing.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vgg16_update import vgg16_factors

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import (
    decode_payload,
    decoders,
    encode_payload,
    parse_codec,
    reference_hash,
)

State = dict[str, Tensor]

CODERS = ("zlib", "zstd", "ans")
CODECS = {
    "none": ("none",),
    "lossless": ("zlib", "zstd", "planes+zlib", "planes+zstd"),
    "fp16": tuple(f"delta+cast:to=fp16+{rest}" for rest in ("zlib", "planes+zlib", "planes+zstd")),
    "int8": ("delta+int8+zlib", "delta+int8+zstd", "delta+int8+ans"),
    "balanced": tuple(f"delta+quantise:rms=0.05+{coder}" for coder in CODERS),
    "top-k 10 %": ("delta+topk:share=0.1+zstd",),
    "small": tuple(f"delta+quantise:rms=2+{coder}" for coder in CODERS),
    "tiny": tuple(f"delta+quantise:rms=4+{coder}" for coder in CODERS),
}
"""Chains by what they are called; of a preset's, error feedback changes nothing in one message."""
LADDER = {
    "raw": None,
    "lossless": "planes+zstd",
    "fp16": "delta+cast:to=fp16+planes+zstd",
    "balanced": "delta+quantise:rms=0.05+zstd",
    "int8": "delta+int8+zlib",
    "small": "delta+quantise:rms=2+ans",
    "tiny": "delta+quantise:rms=4+ans",
}
"""Each step compresses more than the one above; with the coder that the preset prefers."""
ZLIB_LADDER = {
    "raw": None,
    "lossless": "planes+zlib",
    "fp16": "delta+cast:to=fp16+planes+zlib",
    "balanced": "delta+quantise:rms=0.05+zlib",
    "int8": "delta+int8+zlib",
    "small": "delta+quantise:rms=2+zlib",
    "tiny": "delta+quantise:rms=4+zlib",
}
"""The same while the other side's decoders are not known, or where it has no other."""
CURVES = {
    "quantise, step in rms": [f"delta+quantise:rms={2.0**-i:g}+ans" for i in range(-2, 7)],
    "int8": ["delta+int8+zlib"],
    "fp16": ["delta+cast:to=fp16+zlib"],
    "top-k": [f"delta+topk:share={share}+zstd" for share in (0.01, 0.03, 0.1, 0.3)],
    "balanced": ["delta+quantise:rms=0.05+zstd"],
    "small": ["delta+quantise:rms=2+ans"],
    "tiny": ["delta+quantise:rms=4+ans"],
}


@dataclass(frozen=True)
class Update:
    """What a client sends, what the receiver holds, and how to compose weights."""

    trained: State
    reference: State
    model: torch.nn.Module

    @property
    def description(self) -> dict[str, Any]:
        """Return the description of the model, as in the header of a message."""
        return fedpara.ModelSpec.of(self.model).to_json()

    def dense(self, state: State) -> State:
        """Return composed weights and everything that is dense."""
        self.model.load_state_dict(state)
        return {n: t.double() for n, t in fedpara.to_dense(self.model).state_dict().items()}

    @property
    def values(self) -> int:
        """Return how many float32 values travel."""
        return sum(tensor.numel() for tensor in self.trained.values())


class Timed:
    """Calls to be timed, and the least processor time of each in seconds."""

    def __init__(self, **calls: Callable[[], object]) -> None:
        self.calls = calls
        self.least = dict.fromkeys(calls, float("inf"))

    def run(self) -> None:
        """Call each three times: the second and third call find the caches warm."""
        for name, call in self.calls.items():
            for _ in range(3):
                start = time.process_time()
                call()
                self.least[name] = min(self.least[name], time.process_time() - start)


@dataclass(frozen=True)
class Result:
    """Of one codec on one update.

    ``timed`` holds ``encode`` and ``decode``, and both ``known`` where both sides keep the
    reference under its hash.
    """

    size: int
    share: float
    entropy: float
    factors: float
    composed: float
    timed: Timed

    @property
    def spent(self) -> float:
        """Return the seconds to encode and decode."""
        return self.timed.least["encode"] + self.timed.least["decode"]


def load(path: Path | None) -> Update:
    """Load the update from the file, or make a synthetic one."""
    model = vgg16_factors()
    if path is not None:
        saved = torch.load(path, weights_only=True)
        return Update(saved["trained"], saved["reference"], model)
    reference = {name: t.detach().clone() for name, t in model.state_dict().items()}
    trained = {name: t + 0.03 * t.std() * torch.randn_like(t) for name, t in reference.items()}
    return Update(trained, reference, model)


def distance(one: State, other: State, to: State) -> float:
    """Return |one - other| / |other - to| over all tensors."""
    wrong = sum((one[n].double() - other[n].double()).square().sum() for n in one)
    moved = sum((other[n].double() - to[n].double()).square().sum() for n in one)
    return float((wrong / moved) ** 0.5)


def symbol_entropy(chain: str, update: Update) -> float:
    """Return bits per value of the integer symbols before the entropy coder, with one table."""
    codec = parse_codec(chain)
    stages = tuple(stage for stage in codec.stages if not stage.entropy)
    tensors = update.trained
    for stage in stages:
        tensors, _ = stage.encode(tensors, reference=update.reference)
    integers = [t.flatten().int() for t in tensors.values() if not t.is_floating_point()]
    if not integers or any(stage.name in {"topk", "planes"} for stage in stages):
        return float("nan")
    counts = torch.unique(torch.cat(integers), return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum())


def measure(chain: str, update: Update) -> Result:
    """Encode and decode the whole way, payload and hash of the reference included."""
    codec, model, reference = parse_codec(chain), update.description, update.reference
    raw = 4 * update.values
    digest = reference_hash(reference)

    def encode(known: str | None = None) -> bytes:
        return encode_payload(
            update.trained, codec=codec, reference=reference, digest=known, model=model
        )

    def decode(**held: object) -> State:
        return decode_payload(data, limit=raw, **held).tensors

    data = encode()
    back = decode(reference=reference)
    exact = all(torch.equal(back[name], tensor) for name, tensor in update.trained.items())
    states = [update.dense(state) for state in (back, update.trained, update.reference)]
    return Result(
        size=len(data),
        share=(8 + int.from_bytes(data[:8], "little")) / len(data),
        entropy=symbol_entropy(chain, update),
        factors=0.0 if exact else distance(back, update.trained, update.reference),
        composed=0.0 if exact else distance(*states),
        timed=Timed(
            encode=encode,
            decode=lambda: decode(reference=reference),
            encode_known=lambda: encode(digest),
            decode_known=lambda: decode(references={digest: reference}),
        ),
    )


def yardsticks(update: Update) -> Timed:
    """Time a copy of the tensors, zlib at level 6, and a hash of them."""
    plain = b"".join(tensor.numpy().tobytes() for tensor in update.trained.values())
    return Timed(
        copy=lambda: [tensor.clone() for tensor in update.trained.values()],
        packed=lambda: zlib.compress(plain, 6),
        hashed=lambda: reference_hash(update.reference),
    )


def table(
    results: dict[str, dict[str, Result]], update: Update, yards: Mapping[str, float]
) -> Iterable[str]:
    """Render sizes, errors and speeds in Markdown."""
    raw = 4 * update.values
    copy, packed, hashed = (yards[name] for name in ("copy", "packed", "hashed"))
    yield f"{update.values} float32 values in {len(update.trained)} tensors, {raw / 1e6:.2f} MB. "
    yield f"A copy of them runs at {raw / copy / 1e6:.0f} MB/s, zlib level 6 at "
    yield f"{raw / packed / 1e6:.0f} MB/s, the reference's SHA-256 at "
    yield f"{raw / hashed / 1e6:.0f} MB/s."
    yield ""
    yield (
        "| name | codec | MB | bits a value | entropy of symbols | share of table and header | "
        "error, factors | error, composed | encode, MB/s (copies, zlib 6) | "
        "decode, MB/s (copies, zlib 6) | encode, decode with known hash, MB/s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name, chains in results.items():
        for chain, result in chains.items():
            bits = 8 * result.size / update.values
            entropy = "" if result.entropy != result.entropy else f"{result.entropy:.3f}"
            least = result.timed.least
            speeds = [
                f"{raw / seconds / 1e6:.0f} ({seconds / copy:.1f}, {seconds / packed:.3f})"
                for seconds in (least["encode"], least["decode"])
            ]
            known = [raw / least[name] / 1e6 for name in ("encode_known", "decode_known")]
            yield (
                f"| {name} | `{chain}` | {result.size / 1e6:.3f} | {bits:.3f} | {entropy} | "
                f"{100 * result.share:.2f} % | {100 * result.factors:.2f} % | "
                f"{100 * result.composed:.2f} % | {speeds[0]} | {speeds[1]} | "
                f"{known[0]:.0f}, {known[1]:.0f} |"
            )


def where_shorter(saved: int, longer: float) -> str:
    """Return the link speeds at which fewer bytes are worth more computing, and the reverse."""
    if saved >= 0 >= longer:
        return "always"
    if saved <= 0 <= longer:
        return "never"
    limit = f"{8 * saved / longer / 1e6:.0f} Mbit/s"
    return f"up to {limit}" if saved > 0 else f"from {limit} on"


def links(
    ladder: Mapping[str, str | None], results: dict[str, dict[str, Result]], update: Update
) -> Iterable[str]:
    """Return the link speed up to which each rung of the ladder beats the one above."""
    found = {chain: result for chains in results.values() for chain, result in chains.items()}
    rungs = []
    for name, chain in ladder.items():
        if chain is None:
            rungs.append((name, "no codec", 4 * update.values, 0.0))
        elif chain in found:
            result = found[chain]
            rungs.append((name, f"`{chain}`", result.size, result.spent))
    yield "| name | codec | seconds at 100 Mbit/s | faster than the row above | faster than raw |"
    yield "|---|---|---|---|---|"
    for place, (name, chain, size, spent) in enumerate(rungs):
        words = ["", ""]
        for i, other in enumerate((rungs[place - 1], rungs[0]) if place else ()):
            words[i] = where_shorter(other[2] - size, spent - other[3])
        yield f"| {name} | {chain} | {8 * size / 1e8 + spent:.3f} | {words[0]} | {words[1]} |"


def two_layers() -> Iterable[str]:
    """Measure table and header where there is little else."""
    model = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.Linear(64, 10))
    model = fedpara.convert(model, method="fedpara", gamma=0.1)
    described, reference = fedpara.ModelSpec.of(model).to_json(), model.state_dict()
    trained = {name: t + 0.01 * torch.randn_like(t) for name, t in reference.items()}
    yield "| codec | bytes | bytes of table and header |"
    yield "|---|---|---|"
    for name, chain in LADDER.items():
        if chain is not None and ("zstd" not in chain or "zstd" in decoders()):
            codec = parse_codec(chain)
            data = encode_payload(trained, codec=codec, reference=reference, model=described)
            head = 8 + int.from_bytes(data[:8], "little")
            yield f"| {name}, `{chain}` | {len(data)} | {head} |"


def plot(update: Update, path: Path) -> None:
    """Plot bits per value over the relative error of factors and of composed weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for name, chains in CURVES.items():
        results = [measure(chain, update) for chain in chains]
        bits = [8 * result.size / update.values for result in results]
        style = "o-" if len(chains) > 1 else "s"
        for axis, kind in zip(axes, ("factors", "composed"), strict=True):
            axis.plot([getattr(result, kind) for result in results], bits, style, label=name)
    for axis, kind in zip(axes, ("factors", "composed weights"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=f"relative error of the update, {kind}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("bits a value")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--update", type=Path, help="written by vgg16_update.py")
    source.add_argument("--synthetic", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rounds", type=int, default=10, help="of timing, all codecs in each")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    update = load(options.update)
    results = {
        name: {
            chain: measure(chain, update)
            for chain in chains
            if "zstd" not in chain or "zstd" in decoders()
        }
        for name, chains in CODECS.items()
    }
    yards = yardsticks(update)
    for _ in range(options.rounds):  # all in each: none has the machine's quiet moments alone
        for timed in (yards, *(one.timed for found in results.values() for one in found.values())):
            timed.run()
    ladders = [links(ladder, results, update) for ladder in (LADDER, ZLIB_LADDER)]
    for lines in (table(results, update, yards.least), *ladders, two_layers()):
        print("\n".join(lines), end="\n\n")
    if options.plot:
        plot(update, options.plot)


if __name__ == "__main__":
    main()
