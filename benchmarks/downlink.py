"""Cost of the downlink when most clients are away: schemes side by side, on a real training.

    python benchmarks/downlink.py                 # about two minutes on one core

FedAvg on scikit-learn's digits, 100 clients of which 16 take part in a round. Bytes are lengths of
payloads. `broadcast` sends one coded update a round, and a client fetches all that it missed (its
first time, what the scheme beside it sends); it is computed, from the same training.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import Codec, decode_payload, encode_payload, parse_codec
from fedpara_plugins.references import (
    ClientReferences,
    Downlink,
    GridDownlink,
    LostReferenceError,
    PerClientDownlink,
)

State = dict[str, Tensor]
Share = tuple[Tensor, Tensor]

LIMIT = 10**8
RATE = 0.3
DECODERS = ("zlib", "zstd", "ans")


@dataclass
class Result:
    """One run's bytes and accuracy."""

    accuracy: float
    sent: list[int] = field(default_factory=list)
    by_absence: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    broadcast: int = 0


def data(clients: int, seed: int) -> tuple[list[Share], Share]:
    """Return shuffled digits: a list of clients' shares, and test images."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    test = (images[:397], labels[:397])
    return list(zip(images[397:].chunk(clients), labels[397:].chunk(clients), strict=True)), test


def network(init: str, width: int) -> nn.Module:
    """Build a factorised perceptron."""
    net = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    options = {"gamma": 0.1, "clip": 1.0, "variance": "torch", "speed": 0.5}
    return fedpara.convert(net, method="fedpara", init=init, **options)


def trained(model: nn.Module, state: State, share: Share, epochs: int) -> State:
    """Return a client's state after local training from ``state``."""
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    images, labels = share
    for _ in range(epochs):
        for batch in torch.arange(len(labels)).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def accuracy(model: nn.Module, state: State, test: Share) -> float:
    """Return the share of test images that are classified correctly."""
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def served(
    downlink: Downlink,
    held: ClientReferences,
    client: str,
    state: State,
    spec: fedpara.ModelSpec,
    codec: Codec,
) -> tuple[State, int]:
    """Serve one downlink, and repeat it for a client that has lost its reference."""
    size = 0
    for _ in range(2):
        coded = downlink.encode(client, "model", state, spec=spec, codec=codec, decoders=DECODERS)
        size += len(coded.payload)
        try:
            received = held.receive("model", coded.payload, limit=LIMIT)
        except LostReferenceError as lost:
            downlink.refused(client, "model", lost.holds)
            continue
        assert received.reference == coded.reference
        held.keep("model", received)
        downlink.acknowledge(client, "model", received.reference)
        return received.tensors, size
    raise AssertionError("a client was not served within the round")


def run(downlink: Downlink | None, text: str, args: argparse.Namespace) -> Result:
    """Train; without a scheme, full float32 models travel and nothing is coded."""
    torch.manual_seed(args.seed)
    shares, test = data(args.clients, args.seed)
    model = network(args.init, args.width)
    state = copy.deepcopy(model.state_dict())
    spec, codec = fedpara.ModelSpec.of(model), parse_codec(text)
    held = [ClientReferences() for _ in shares]
    seen = [-1] * len(shares)
    draw = torch.Generator().manual_seed(args.seed)
    result, updates, last = Result(0.0), [], None
    for now in range(args.rounds):
        if downlink is not None:
            payload = encode_payload(
                state, codec=codec.resolved(DECODERS), reference=last, model=spec.to_json()
            )
            updates.append(len(payload))
            last = decode_payload(payload, reference=last, limit=LIMIT).tensors
        results = []
        for who in torch.randperm(len(shares), generator=draw)[: args.a_round].tolist():
            got, size = state, len(encode_payload(state, codec=parse_codec("none")))
            if downlink is not None:
                got, size = served(downlink, held[who], str(who), state, spec, codec)
                result.broadcast += size if seen[who] < 0 else sum(updates[seen[who] + 1 :])
                if seen[who] >= 0:
                    result.by_absence[now - seen[who]].append(size)
            seen[who] = now
            result.sent.append(size)
            results.append(trained(model, got, shares[who], args.epochs))
        state = {name: torch.stack([one[name] for one in results]).mean(0) for name in results[0]}
    result.accuracy = accuracy(model, state, test)
    return result


def main() -> None:
    """Print one line for each codec and scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--a-round", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--init", default="seeded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codecs", default="int8,balanced,small")
    args = parser.parse_args()
    plain = run(None, "none", args)
    whole = sum(plain.sent)
    print(f"{args.a_round} of {args.clients} clients, {args.rounds} rounds, init {args.init}")
    print(f"{'full float32':28} {whole:>11,} B   x{1:6.1f}   accuracy {plain.accuracy:.3f}")
    for text in args.codecs.split(","):
        for scheme in (PerClientDownlink, GridDownlink):
            start = time.perf_counter()
            downlink = scheme()
            result = run(downlink, text, args)
            if scheme is PerClientDownlink:
                total = result.broadcast
                print(f"{text + ' broadcast and fetch':28} {total:>11,} B   x{whole / total:6.1f}")
            total = sum(result.sent)
            print(
                f"{text + ' ' + scheme.__name__:28} {total:>11,} B   x{whole / total:6.1f}   "
                f"accuracy {result.accuracy:.3f}   {dict(downlink.counts)}   "
                f"{time.perf_counter() - start:.0f} s"
            )
            print(" " * 28, "mean bytes after 1, 2, ... rounds:", _by_absence(result))
            downlink.close()


def _by_absence(result: Result) -> str:
    means = {gap: sum(sizes) / len(sizes) for gap, sizes in sorted(result.by_absence.items())}
    return ", ".join(
        f"{gap}: {mean:.0f}" for gap, mean in means.items() if gap in (1, 2, 5, 10, 15)
    )


if __name__ == "__main__":
    main()
