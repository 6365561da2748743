"""The wrapper that a user puts around a ServerApp, whose Grid then encodes and decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.exchange import server_checkpoint
from fedpara_plugins.support import announced_run, hold_state_dir, other_runs
from fedpara_plugins_flower.factories import plain_model_hint
from fedpara_plugins_flower.logs import log, show_core_logs
from fedpara_plugins_flower.messages.legacy_lists import named_state
from fedpara_plugins_flower.messages.sixteen_bits import hint_of
from fedpara_plugins_flower.privacy.secagg import complete_sums
from fedpara_plugins_flower.run import Run, open_run
from fedpara_plugins_flower.seams import (
    change_class,
    seen_components,
    superlink_of_this_process,
)
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.evaluation import record_evaluations
from fedpara_plugins_flower.server.final_state import FinalState
from fedpara_plugins_flower.server.grid import CodecGrid
from fedpara_plugins_flower.server.legacy_metrics import guard_metrics
from fedpara_plugins_flower.server.observing_grid import ObservingGrid
from fedpara_plugins_flower.server.own_infinities import keep_infinities, keep_infinities_of_legacy
from fedpara_plugins_flower.server.paths import log_relative_paths
from fedpara_plugins_flower.server.resume import ResumableRounds
from fedpara_plugins_flower.server.round_checks import guarded_aggregation
from fedpara_plugins_flower.server.strategy_arrays import record_strategy, with_remedy
from fedpara_plugins_flower.server.strategy_hooks import install_start_hooks
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["server_app"]

A = TypeVar("A", bound=ServerApp)
App = Callable[[Grid, Context], None]


def server_app(app: A, **options: Any) -> A:
    """Let a ServerApp run with the plugin, as its run's config says.

    The same object is returned, still a ServerApp of its class: ``@app.main()`` and everything else
    work on it as before.

    Args:
        app: of the Message API, or of the legacy API with a ``server_fn``.
        options: those of the section ``[tool.flwr.app.config.fedpara]``, for ``run_simulation``,
            whose config is empty. An option of the run's config takes precedence. Give the clients
            the same options: ``fedpara.client_mod_with(...)``.

    Raises:
        ConfigError: if an option is unknown or out of range. Options of the section are checked
            when the app runs.
    """
    FlowerSettings.from_run_config({}, options)
    if not hasattr(app, "_fedpara_plugin"):
        change_class(app, _subclass(type(app), options))
    return app


def _subclass(base: type[Any], options: Mapping[str, Any]) -> type[Any]:
    class ServerAppWithPlugin(base):  # type: ignore[misc]
        _fedpara_plugin = True

        def __call__(self, grid: Grid, context: Context) -> None:
            settings = FlowerSettings.from_run_config(context.run_config, options)
            with seen_components(self, _prepare if settings.active else _pass_over):
                _run_app(super().__call__, grid, context, settings)

    ServerAppWithPlugin.__name__ = base.__name__
    ServerAppWithPlugin.__qualname__ = base.__qualname__
    return ServerAppWithPlugin


def _prepare(components: Any) -> None:
    """Prepare the strategy of a legacy app."""
    guard_metrics(components)
    keep_infinities_of_legacy(components)


def _pass_over(components: Any) -> None:
    """Leave a legacy app as it is."""


def _run_app(app: App, grid: Grid, context: Context, settings: FlowerSettings) -> None:
    show_core_logs()
    log_relative_paths(settings)
    final = FinalState()
    run = Run(settings, side="server", on_loaded=final.seen)
    mine = str(context.run_id), superlink_of_this_process() if settings.active else ""
    run.other_runs = partial(other_runs, *mine)
    with announced_run(*mine), _held_state_dir(run, context):
        _run_held(app, grid, context, run, final)


def _held_state_dir(run: Run, context: Context) -> AbstractContextManager[object]:
    folder = run.settings.state_dir
    if folder is None:
        return nullcontext()
    return hold_state_dir(folder, run=str(context.run_id), role="server", outages=run.outages)


def _run_held(app: App, grid: Grid, context: Context, run: Run, final: FinalState) -> None:
    settings = run.settings
    accounting = Accounting(settings.ledger, settings.config, run.outages)
    _add_hooks(run, accounting)
    wrapped = (
        CodecGrid(grid, run, accounting, final)  # type: ignore[abstract]
        if settings.active
        else ObservingGrid(grid, accounting, final)  # type: ignore[abstract]
    )
    failure = None
    try:
        with open_run(run):
            try:
                _serve(app, wrapped, context, run)
            except Exception as error:
                if settings.active and (better := with_remedy(error)) is not error:
                    raise better from error
                raise
            finally:
                accounting.log_run()
                if isinstance(wrapped, CodecGrid):
                    wrapped.close()
        failure = _write_checkpoint(run, final)
    finally:
        run.outages.log_last_line()
    if failure is not None:
        raise failure  # only now: the app has its result, and the log says where the model lies


def _add_hooks(run: Run, accounting: Accounting) -> None:
    settings = run.settings
    install_start_hooks()
    if settings.active:
        run.on_start.append(record_strategy(run))
        run.on_start.append(guarded_aggregation(run))
        run.on_start.append(keep_infinities)
    if settings.ledger is not None:
        run.on_evaluated = accounting.ledger.log
        run.on_start.append(record_evaluations(run.on_evaluated))
    if settings.state_dir is not None:  # last: it counts the rounds for all others
        rounds = ResumableRounds(settings.state_dir / "server", run.outages)
        run.on_start.append(rounds.around_start)


def _serve(app: App, grid: CodecGrid | ObservingGrid, context: Context, run: Run) -> None:
    """Run the app, and raise the Grid's own error instead of the errors that follow from it."""
    if isinstance(grid, ObservingGrid):
        app(grid, context)
        return
    complete_sums()
    try:
        app(grid, context)
    except Exception as error:
        if grid.fatal is not None and error is not grid.fatal:
            raise grid.fatal from error
        own = isinstance(error, FedParaError)
        if not own and (hint := plain_model_hint(error, run) or hint_of(error)) is not None:
            raise ConfigError(hint) from error
        raise
    grid.finish()


def _write_checkpoint(run: Run, final: FinalState) -> FedParaError | None:
    """Write the server's dense model; return the error to end with if the disk refuses it."""
    path = run.settings.checkpoint
    if path is None:
        return None
    state: dict[str, Tensor] | None = named_state(final.state(), run.specs)
    if state is None:
        log.warning(
            "fedpara: no checkpoint written: after the last training round the global model was "
            "neither sent to clients for evaluation nor loaded on the server. Save "
            "fedpara.to_dense(result.arrays) in the app instead."
        )
        return None
    spec = run.spec_of(state)
    model = "the server's model"
    if spec is not None:
        if spec.private_factors:
            model += ": W1, the shared part (private part zero)"
        shared = {k: v for k, v in state.items() if k not in spec.private_factors}
        state = spec.dense_state(shared)
    return server_checkpoint(
        path, state, model=model, method=run.settings.config.method, log=log, outages=run.outages
    )
