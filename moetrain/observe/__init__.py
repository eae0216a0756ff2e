"""What a run reports: metrics, events, W&B and the progress display.

Knows no ranks and no model: it gets records and writes or shows them.
"""

from moetrain.observe.events import (
    EventLog,
    baselines_by_source,
    has_finished,
    model_event,
    read_events,
)
from moetrain.observe.json_lines import append_line
from moetrain.observe.ledger import Account, Span, account, run_account
from moetrain.observe.metrics import (
    FinalLoss,
    GuardedSink,
    MetricsFile,
    Record,
    Sink,
    by_source,
    final_loss,
    iterate_metrics,
    iterate_numbers,
    numbers_of,
    read_metrics,
)
from moetrain.observe.progress import ProgressDisplay
from moetrain.observe.stored_loads import (
    EXPERT_LOAD,
    StoredLoad,
    expert_load,
    read_load,
    records_without_loads,
)
from moetrain.observe.tally import Tally, read_sign
from moetrain.observe.wandb_sink import WandbSink

__all__ = [
    "EXPERT_LOAD",
    "Account",
    "EventLog",
    "FinalLoss",
    "GuardedSink",
    "MetricsFile",
    "ProgressDisplay",
    "Record",
    "Sink",
    "Span",
    "StoredLoad",
    "Tally",
    "WandbSink",
    "account",
    "append_line",
    "baselines_by_source",
    "by_source",
    "expert_load",
    "final_loss",
    "has_finished",
    "iterate_metrics",
    "iterate_numbers",
    "model_event",
    "numbers_of",
    "read_events",
    "read_load",
    "read_metrics",
    "read_sign",
    "records_without_loads",
    "run_account",
]
