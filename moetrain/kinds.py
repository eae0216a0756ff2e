"""The kinds of events and of failures, written and read by the same names."""

from enum import StrEnum, auto


class EventKind(StrEnum):
    """What `event` may be in `events.jsonl`."""

    # How the folder of a run came to be
    import_ = "import"
    upcycle = auto()
    branch = auto()
    # A command, by the driver: its beginning and its end
    start = auto()
    model = auto()
    """The size of the model, for `start`."""
    data = auto()
    """A source and its baselines, for `start`."""
    finish = auto()
    """All steps are done."""
    stop = auto()
    """It stopped on request, after saving."""
    fail = auto()
    # Supervision
    attempt = auto()
    """Ranks were started."""
    failure = auto()
    """An attempt ended by a failure: `failure` has its kind."""
    restart = auto()
    move = auto()
    """The ranks stop after a save, to move to other nodes."""
    node_left_out = auto()
    # Training, by the first rank
    resume = auto()
    settings_changed = auto()
    data_order = auto()
    training = auto()
    """The first step of an attempt is about to be taken."""
    step_skipped = auto()
    straggler = auto()
    straggler_over = auto()
    warning = auto()
    wandb = auto()
    # Checkpoints
    save = auto()
    checkpoint_rejected = auto()
    download = auto()
    upload = auto()
    upload_failed = auto()
    upload_skipped = auto()
    remote_deleted = auto()
    remote_delete_failed = auto()
    # Never written: the ledger derives it from a heartbeat that outlived its command
    sign = auto()


class FailureKind(StrEnum):
    """Why a rank ended. All but `error` are worth another attempt."""

    died = auto()
    """Its process died."""
    lost = auto()
    """Its node doesn't answer."""
    preempted = auto()
    """Its node was preempted."""
    hung = auto()
    """It sent no heartbeat in time."""
    memory = auto()
    """It ran out of memory."""
    peer = auto()
    """It lost another rank in a collective."""
    service = auto()
    """A server or a file system failed."""
    error = auto()
    """Its own exception, which another attempt would raise again."""
