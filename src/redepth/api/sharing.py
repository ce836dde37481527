"""Verbs that send a checkpoint elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redepth.checkpoint.publish import Publication


def plan_publication(checkpoint: str | Path, repository: str) -> "Publication":
    """What `publish` would upload, and what the checkpoint lacks; nothing is sent. Errors are those of `publish`."""
    from redepth.checkpoint.publish import plan_publication as plan

    return plan(checkpoint, repository)


def publish(
    checkpoint: str | Path, repository: str, *, private: bool = False, even_unfinished: bool = False
) -> "Publication":
    """Upload a checkpoint's weights, modelling files, card and records to a hub repository, in one commit.

    Args:
        checkpoint: local folder.
        repository: such as `you/your-model`; made where there is none.
        private: for a new repository.
        even_unfinished: also a checkpoint that is not verified, healed or calibrated, or whose source names no licence.

    Raises:
        RedepthError: for a checkpoint that lacks one of these, no token, or a hub that can't be reached or refuses.
    """
    from redepth.checkpoint.publish import publish as send

    return send(checkpoint, repository, private=private, even_unfinished=even_unfinished)
