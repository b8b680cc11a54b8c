"""`org/name` and `org/name@revision`: model folders of the Hugging Face hub, in the cache that its users share."""

import os
import re
from functools import lru_cache

from sftcli.errors import CheckpointError

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # no pickles, no code
UNWANTED = ["*/*", "consolidated*"]  # the model again in other forms
OFFLINE_HINT = "where there is a network, `hf download {repo}` fills the cache; or name a folder"


@lru_cache
def local(path: str) -> str:
    """A path as it is, or the snapshot (downloaded once) of the hub's repository it names. Raises CheckpointError."""
    found = NAME.fullmatch(path)
    if not found or os.path.exists(path) or os.path.isdir(os.path.dirname(path)):  # runs/typo is no organisation
        return path
    from huggingface_hub import errors, snapshot_download  # half a second

    repo, revision = found["repo"], found["revision"]
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: its owners ask you to accept terms",
            hint="accept them on its page, then `hf auth login`",
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"there is no folder {path} here, and no model {repo} on the Hugging Face hub") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{path} is no name of a model: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = "offline, and it is not in the cache" if _offline(error) else str(error).partition("\n")[0]
        raise CheckpointError(
            f"there is no folder {path} here, and the Hugging Face hub cannot be asked for it: {reason}",
            hint=OFFLINE_HINT.format(repo=repo),
        ) from None


def _offline(error: Exception) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    return constants.HF_HUB_OFFLINE or isinstance(error, LocalEntryNotFoundError)
