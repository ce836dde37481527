"""Cache rules: which step's keys and values a token may read."""

import difflib
import re
from dataclasses import dataclass

from .errors import UserError

KNOWN_RULES = "full, latest, skip, ring-N, first-R-then-last, or latest or skip joined to one of the last two by a +"


@dataclass(frozen=True)
class CacheRule:
    """Which steps' keys and values are kept, and what stands in for a step that an earlier token never ran.

    Attributes:
        name: the rule as redepth writes it, such as `latest+ring-4`.
        missing: `refuse` such a token, let its `latest` step stand in, or `skip` it.
        ring: keep this many steps, step i in the place of step i − ring; 0 keeps all.
        first: keep this many steps and, in one more place, the last one; 0 keeps all.
    """

    name: str
    missing: str = "refuse"
    ring: int = 0
    first: int = 0

    def place(self, step: int) -> int:
        """Where step 1, 2, … is kept, counted from 1; step 0 stands for prelude and coda."""
        if self.ring and step:
            return (step - 1) % self.ring + 1
        return min(step, self.first + 1) if self.first else step

    def places(self, num_steps: int) -> int:
        """How many places `num_steps` steps take up."""
        return min(num_steps, self.ring or self.first + 1) if self.ring or self.first else num_steps


def _published_name(rule: str) -> str:
    """redepth's name for a rule of the published code, which counts layer-steps of Huginn's four core layers."""
    if rule == "compress-anchor":
        return "first-8-then-last"
    name = re.sub(r"^(latest|skip)-compress-", r"\1+compress-", rule.replace("latest-m4", "latest"))
    return re.sub(r"compress-s(\d+)$", lambda match: f"ring-{int(match[1]) / 4:g}", name)


def parse_cache_rule(rule: str) -> CacheRule:
    """The rule of that name, or of that published alias.

    Raises:
        ValueError: for a rule that redepth does not know.
    """
    if not isinstance(rule, str):
        raise UserError(f"unknown cache rule {rule!r}; use {KNOWN_RULES}")
    name = _published_name(rule)
    parts = name.split("+")
    if name == "full":
        return CacheRule("full")
    missing = parts.pop(0) if parts[0] in ("latest", "skip") else "refuse"
    kept = re.fullmatch(r"(?:ring-(?P<ring>[1-9]\d*)|first-(?P<first>[1-9]\d*)-then-last)", "+".join(parts))
    if kept is not None:
        return CacheRule(name, missing, int(kept["ring"] or 0), int(kept["first"] or 0))
    if not parts:
        return CacheRule(name, missing)
    near = difflib.get_close_matches(
        rule, ("full", "latest", "skip", "ring-4", "latest+ring-4", "first-8-then-last"), 1
    )
    hint = f"did you mean {near[0]!r}?" if near else f"use {KNOWN_RULES}"
    raise UserError(f"unknown cache rule {rule!r}; {hint}")


_KNOWN: dict[str, CacheRule] = {}


def known_rule(name: str) -> CacheRule:
    """`parse_cache_rule` of a name that redepth wrote itself, read once."""
    if name not in _KNOWN:
        _KNOWN[name] = parse_cache_rule(name)
    return _KNOWN[name]
