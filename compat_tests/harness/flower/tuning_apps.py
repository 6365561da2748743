"""Apps in the form of Flower's own for fine-tuning, in small: Whisper's encoder, and a ViT.

Both send a head alone, under the head's own names, over a body that all sides hold. Whisper's
factory returns a tuple, whose encoder requires gradients and is never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from transformers import WhisperConfig, WhisperForConditionalGeneration

import fedpara_plugins_flower as fedpara
from harness.flower.apps import Apps, Outcome

__all__ = ["TUNING", "TuningApp", "tuning_apps", "vision_transformer", "whisper"]

NUM_CLASSES = 12


def whisper() -> tuple[nn.Module, nn.Module]:
    """Return an encoder with trained weights, and a fresh classifier."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=100, num_mel_bins=16, d_model=48,
        max_source_positions=20, max_target_positions=8,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=96,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    encoder = WhisperForConditionalGeneration(config).get_encoder()
    classifier = nn.Sequential(
        nn.Conv1d(20, 32, kernel_size=1),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(32 * 48, NUM_CLASSES),
    )
    return _looking_trained(encoder), classifier


def vision_transformer() -> nn.Module:
    """Return a frozen body with a fresh head."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96
    )
    model.heads[-1] = nn.Linear(48, 4 * NUM_CLASSES)
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    return model


def _looking_trained(model: nn.Module) -> nn.Module:
    """Add the few strong directions that training gives."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                u, v = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
                weight.add_(u @ v * weight.std())
    return model


@dataclass(frozen=True)
class TuningApp:
    """What differs between the two.

    Attributes:
        factory: builds the model, or the encoder and the classifier.
        head: returns what is sent and trained.
        features: returns what the body makes of a batch, and the head takes.
        batch: the shape of a batch.
    """

    factory: Callable[[], Any]
    head: Callable[[Any], nn.Module]
    features: Callable[[Any, Tensor], Tensor]
    batch: tuple[int, ...]


def _before_heads(model: Any, images: Tensor) -> Tensor:
    heads, model.heads = model.heads, nn.Identity()
    try:
        found: Tensor = model(images)
    finally:
        model.heads = heads
    return found


TUNING: Mapping[str, TuningApp] = {
    "whisper": TuningApp(whisper, lambda both: both[1], lambda b, x: b[0](x)[0], (8, 16, 40)),
    "vit": TuningApp(vision_transformer, lambda m: m.heads, _before_heads, (8, 3, 16, 16)),
}


class ExclusiveFedAvg(FedAvg):
    """Leaves out clients that say that they have not trained."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Average the others."""
        trained = [r for r in replies if r.content["config"]["trained"]]  # type: ignore[index]
        return super().aggregate_train(server_round, trained)


def tuning_apps(
    app: TuningApp, *, plugin: bool = True, seen: list[Tensor] | None = None, rounds: int = 2
) -> Apps:
    """Return an app of two clients, of which the second trains in the second round alone.

    Args:
        app: which one.
        plugin: whether both sides have the README's lines.
        seen: receives what the body makes of a batch on a client, at the start of each training.
        rounds: of the run.
    """
    get_model = app.factory
    if plugin:
        get_model = fedpara.factorised(lambda: app.factory())

    def client() -> ClientApp:
        client_app = ClientApp(mods=[fedpara.client_mod]) if plugin else ClientApp()

        @client_app.train()
        def train(msg: Message, context: Context) -> Message:
            content: Any = msg.content
            partition = int(str(context.node_config["partition-id"]))
            model = get_model()
            head = app.head(model)
            head.load_state_dict(content["arrays"].to_torch_state_dict(), strict=True)
            if seen is not None:
                seen.append(app.features(model, _inputs(app, 99)).detach())
            trained = partition == 0 or content["config"]["server-round"] == 2
            if trained:
                _train(app, model, partition)
            arrays = ArrayRecord(head.state_dict())
            metrics = MetricRecord({"train_loss": 0.0, "num-examples": 8} if trained else {})
            config = ConfigRecord({"trained": trained})
            reply = RecordDict({"arrays": arrays, "metrics": metrics, "config": config})
            return Message(reply, reply_to=msg)

        return client_app

    def server(outcome: Outcome) -> ServerApp:
        server_app = fedpara.server_app(ServerApp()) if plugin else ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
                model = get_model()
                head = app.head(model)
                head.load_state_dict(arrays.to_torch_state_dict(), strict=True)
                with torch.no_grad():
                    loss = _loss(app, model, 0)
                outcome.losses.append(float(loss))
                return MetricRecord({"loss": float(loss)})

            result = ExclusiveFedAvg(fraction_evaluate=0.0).start(
                grid=grid,
                initial_arrays=ArrayRecord(app.head(get_model()).state_dict()),
                num_rounds=rounds,
                evaluate_fn=evaluate,
            )
            outcome.state = dict(result.arrays.to_torch_state_dict())

        return server_app

    return Apps(client, server, 2)


def _train(app: TuningApp, model: Any, seed: int) -> None:
    optimizer = torch.optim.Adam(app.head(model).parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        _loss(app, model, seed).backward()
        optimizer.step()


def _loss(app: TuningApp, model: Any, seed: int) -> Tensor:
    with torch.no_grad():
        features = app.features(model, _inputs(app, seed))
    labels = torch.arange(len(features)) % NUM_CLASSES
    return nn.functional.cross_entropy(app.head(model)(features), labels)


def _inputs(app: TuningApp, seed: int) -> Tensor:
    return torch.randn(app.batch, generator=torch.Generator().manual_seed(seed))
