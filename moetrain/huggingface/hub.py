"""Models of the Hugging Face Hub, fetched by its own library into its own cache.

Owns which files are fetched, in which order, and the messages of failures. Where the Hub is
(HF_ENDPOINT), the cache, tokens, resuming and HF_HUB_OFFLINE are the library's; this is the only
file that imports it.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.commands.shell import shell_command
from moetrain.huggingface.names import ConversionError
from moetrain.huggingface.weights import INDEX, SINGLE

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(text: str) -> bool:
    """Whether a text that should name a folder names a model on the Hub.

    `models/mine` with a folder `models` here is a folder that isn't there.
    """
    return (
        _NAME.fullmatch(text) is not None
        and not Path(text).exists()
        and not Path(text).parent.exists()
    )


def fetch_model(
    name: str,
    *,
    revision: str | None,
    cache_dir: str | None,
    others: Sequence[str],
    demand: Callable[[Path], object],
) -> Path:
    """Returns a folder with a model's config.json, its safetensors, and files like `others`.

    `demand` is called before the weights are fetched, with the folder of everything else, and
    raises where they would be of no use. What is in the cache is not fetched again, and what
    was fetched in part is resumed. Raises ConversionError for a model that there isn't, or that
    nobody may have, and OSError where the Hub can't be reached.
    """
    fetch = _Fetch(name, revision=revision, cache_dir=cache_dir)
    small = fetch.files(["config.json", "generation_config.json", INDEX, *others])
    demand(small)
    # Of one commit, also where the branch moves on meanwhile.
    fetch.revision = small.name
    return fetch.files(_weights(small))


def _weights(folder: Path) -> list[str]:
    """Returns the names of the files of weights: some models have all of them in two forms."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except FileNotFoundError:
        return [SINGLE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{folder / INDEX} can't be read: {error!r}") from None


class _Fetch:
    """One model at one revision; translates the library's errors."""

    def __init__(self, name: str, *, revision: str | None, cache_dir: str | None) -> None:
        self.name, self.revision, self.cache_dir = name, revision, cache_dir
        self._asked = revision

    def files(self, patterns: Sequence[str]) -> Path:
        """Returns the folder of the files that fit, fetched if need be."""
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError:
            raise self._refused("is a name on the Hub, which huggingface_hub fetches") from None
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    allow_patterns=list(patterns),
                )
            )
        except errors.GatedRepoError:
            raise ConversionError(
                "is a model whose terms must be accepted first: do so at "
                f"https://huggingface.co/{self.name}, then log in with hf auth login or HF_TOKEN"
            ) from None
        except errors.RepositoryNotFoundError:
            raise ConversionError(
                "is no folder here, and the Hub has no such model, or not for you: for a private "
                "one log in with hf auth login, or set HF_TOKEN"
            ) from None
        except errors.RevisionNotFoundError:
            raise ConversionError(f"has no revision={self._asked} on the Hub") from None
        except errors.HFValidationError as error:
            raise ConversionError(f"is no folder here, and no name on the Hub: {error}") from None
        except Exception as error:  # of a network, a proxy, a disk: each library has its own
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                cache = self.cache_dir or huggingface_hub.constants.HF_HUB_CACHE
                raise self._refused(
                    f"is a name on the Hub, HF_HUB_OFFLINE is set, and {cache} hasn't all of it"
                ) from None
            raise OSError(
                f"from={self.name}: can't be fetched from the Hub: {_brief(error)}; the same "
                f"command resumes from what was fetched. {self._by_hand()}"
            ) from None

    def _refused(self, reason: str) -> ConversionError:
        return ConversionError(f"{reason}. {self._by_hand()}")

    def _by_hand(self) -> str:
        words = ["hf", "download", self.name]
        words += ["--revision", self._asked] if self._asked else []
        words += ["--exclude", "consolidated*", "--exclude", "*.bin", "--exclude", "*.pt"]
        command = shell_command([*words, "--local-dir", self.name.rpartition("/")[2]])
        return (
            "Where there is a network and huggingface_hub is installed (pip install "
            f"huggingface_hub), `{command}` fetches it: give that folder here"
        )


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
