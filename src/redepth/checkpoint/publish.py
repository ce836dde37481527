"""Uploading a checkpoint to the hub, once it is something to show."""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from redepth.errors import RedepthError, first_line, one_line

from .card import write_card
from .folder import (
    CARD_FILE,
    CONFIG_FILE,
    HEALING_FILE,
    VERIFICATION_FILE,
    CheckpointFolder,
    read_json,
    read_recipe,
)
from .load import local_checkpoint, read_config

NO_LICENSE = "unknown"


@dataclass(frozen=True)
class Publication:
    """What is uploaded, and where to.

    Attributes:
        files: name and size in bytes.
        card: README.md as it goes up.
        license: that the card names.
        lacks: what should be there and is not, in words.
        url: of the repository, once it is uploaded.
    """

    repository: str
    files: dict[str, int]
    card: str
    license: str
    lacks: list[str]
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_publication(checkpoint: str | Path, repository: str) -> Publication:
    """What `publish` would upload; nothing is sent.

    Raises:
        RedepthError: for a folder that holds no recurrent checkpoint, and for a name that no repository can have.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RedepthError(f"repository {repository!r}: {one_line(error)}") from None
    folder = local_checkpoint(checkpoint)
    config, _ = read_config(folder)
    place = CheckpointFolder(folder)
    names = {name for name in place.owned() | {CARD_FILE, "LICENSE"} if (folder / name).is_file()}
    names = {name for name in names if not any(part.startswith(".") for part in Path(name).parts)}
    card = _card(folder, repository)
    license = read_recipe(folder).get("source", {}).get("license") or NO_LICENSE
    verification = read_json(folder / VERIFICATION_FILE)
    lacks = []
    if verification is None:
        lacks.append("it is not verified: redepth verify")
    if not (folder / HEALING_FILE).is_file():
        lacks.append("it is not healed: redepth heal")
    if config.depth_profile is None:
        lacks.append("it has no depth profile: redepth calibrate")
    if not card:
        lacks.append(f"it has no card: write a {CARD_FILE}")
    if license == NO_LICENSE:
        lacks.append("its source names no licence: say in recipe.yaml, source.license, which one it has")
    if not any(name.endswith(".py") for name in names):
        lacks.append("it has no modelling files, so it loads with redepth alone: redepth convert saves it anew")
    if CONFIG_FILE not in names or not place.weights():
        raise RedepthError(f"{folder} has no weights to publish")
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    if card:
        sizes[CARD_FILE] = len(card.encode())
    return Publication(repository, sizes, card, license, lacks)


def _card(folder: Path, repository: str) -> str:
    """The card under the repository's name: made anew from the records, or as its owner wrote it."""
    with tempfile.TemporaryDirectory() as beside:
        write_card(Path(beside), repository, base=folder)
        for card in (Path(beside) / CARD_FILE, folder / CARD_FILE):
            if card.is_file():
                return card.read_text(encoding="utf-8")
    return ""


def publish(
    checkpoint: str | Path, repository: str, *, private: bool = False, even_unfinished: bool = False
) -> Publication:
    """Upload a checkpoint folder's own files in one commit; the repository is made where there is none.

    Args:
        private: for a new repository.
        even_unfinished: also a checkpoint that is not verified, healed, calibrated, or whose licence is not known.

    Raises:
        RedepthError: for a checkpoint that lacks something, no token, or a hub that can't be reached or says no.
    """
    plan = plan_publication(checkpoint, repository)
    if plan.lacks and not even_unfinished:
        raise RedepthError(f"{checkpoint} is not ready to publish; {'; '.join(plan.lacks)}; or add --even-unfinished")
    api = HfApi(library_name="redepth")
    try:
        api.whoami()
        url = api.create_repo(repository, private=private, exist_ok=True)
        folder = local_checkpoint(checkpoint)
        contents: dict[str, Any] = {name: folder / name for name in plan.files} | {CARD_FILE: plan.card.encode()}
        additions = [CommitOperationAdd(name, contents[name]) for name in plan.files]
        api.create_commit(url.repo_id, additions, commit_message="Upload with redepth")
    except LocalTokenNotFoundError:
        raise RedepthError("there is no hub token on this machine; run: hf auth login") from None
    except HfHubHTTPError as error:
        raise RedepthError(f"the hub refused {repository!r}: {first_line(error)}") from None
    except (httpx.HTTPError, OSError) as error:
        raise RedepthError(f"the hub can't be reached: {first_line(error)}") from None
    return replace(plan, url=str(url))
