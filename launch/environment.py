"""Which of the command's environment variables ranks get: those listed here, and no others.

The rest of a shell's environment (keys of other services, session cookies, agents' sockets) has no
business on other machines. Decides by names alone, and starts nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from data_pipeline.threads import WAITING
from moetrain.checks import ConfigError
from moetrain.redaction import is_secret_name, redacted_text

OF_A_MACHINE = (
    # Machine-specific: never sent to another machine.
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LC_*", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "DYLD_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "XDG_*", "HOSTNAME", "TERM",
    "CUDA_*", "NVIDIA_*", "ROCR_*", "HIP_*", "RAY_*", "SLURM_*", "KUBERNETES_*",
    "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
OF_A_RUN = (
    # Computation and communication: the same on all ranks.
    "OMP_*", "MKL_*", "OPENBLAS_*", "KMP_*", "GOMP_*", "ONEDNN_*", "DNNL_*", "MALLOC_*",
    "TORCH_*", "TORCHINDUCTOR_*", "PYTORCH_*", "TRITON_*", "CUBLAS_*", "CUDNN_*",
    "NCCL_*", "GLOO_*", "FI_*", "UCX_*", "TP_SOCKET_IFNAME",
    # Access to stores of shards and checkpoints.
    "AWS_*", "S3_*", "GOOGLE_*", "CLOUDSDK_*", "GCSFS_*", "STORAGE_EMULATOR_HOST", "FSSPEC_*",
    "HF_*", "HUGGING_FACE_*", "TRANSFORMERS_*", "TOKENIZERS_*",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "all_proxy",
    # Only the first rank gets these.
    "WANDB_*",
)  # fmt: skip
OF_THE_FIRST_RANK = ("WANDB_*",)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The variables that ranks get besides their machine's own."""

    public: Mapping[str, str]
    """Set before a rank's process starts. Ray shows these to all its users."""
    secret: Mapping[str, str]
    """Set inside the process, and never passed to Ray as settings."""

    def secrets_of(self, rank: int) -> dict[str, str]:
        """Returns the secrets that a rank needs."""
        return {
            name: value
            for name, value in self.secret.items()
            if rank == 0 or not _fits(name, OF_THE_FIRST_RANK)
        }


def for_ranks(
    environ: Mapping[str, str], *, cluster_env: Mapping[str, str], pass_env: Sequence[str]
) -> Environment:
    """Returns the part of an environment that ranks get: the listed names, `pass_env`, and
    `cluster.env`.

    `pass_env` has names, or patterns such as `MY_*`. Raises ConfigError for a name that isn't set.
    """
    for name in pass_env:
        if name not in environ and not any(sign in name for sign in "*?["):
            raise ConfigError(
                "launch.pass_env", name, "isn't set in this environment: leave it out"
            )
    # `cluster.env` may say by one variable how threads wait, and this process by another.
    replaced = WAITING if any(name in cluster_env for name in WAITING) else ()
    wanted = {
        name: value
        for name, value in environ.items()
        if (_fits(name, OF_A_RUN) or _fits(name, pass_env)) and name not in replaced
    } | dict(cluster_env)
    secret = {
        name: value
        for name, value in wanted.items()
        if is_secret_name(name) or redacted_text(value, environ=environ) != value
    }
    public = {name: value for name, value in wanted.items() if name not in secret}
    return Environment(public=public, secret=secret)


@contextmanager
def reduced(environment: Environment) -> Iterator[None]:
    """Within the context, this process has only the variables that a rank on this machine starts
    with."""
    before = dict(os.environ)
    kept = {name: value for name, value in before.items() if _fits(name, OF_A_MACHINE)}
    _become(kept | dict(environment.public))
    try:
        yield
    finally:
        # What Ray set for itself meanwhile stays.
        begun = kept | dict(environment.public)
        since = {name: value for name, value in os.environ.items() if begun.get(name) != value}
        _become(before | since)


def _become(environ: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
