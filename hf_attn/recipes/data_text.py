"""Text that needs no download: the documentation that Python carries for its own `help()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

SHARED = 120
"""Characters from which a paragraph that two topics have in common makes them one group."""
HELD_OUT = 0.1
"""Share of the characters that validation, and test, hold at most."""


def pydoc(split_seed: int = 0) -> DatasetDict:
    """The topics of `pydoc_data.topics` (80 % to train, by characters), one document a row.

    Some topics quote others. A topic whose paragraphs are all in another one is left out, and topics that share a long
    paragraph stay in one split, so that nothing held out was seen in training. The text belongs to the version of
    Python that runs.

    Returns:
        Splits with the columns `topic` and `text`.
    """
    from pydoc_data.topics import topics

    import numpy as np
    from datasets import Dataset, DatasetDict

    groups = topic_groups(topics)
    order = np.random.default_rng(split_seed).permutation(len(groups))
    budget = HELD_OUT * sum(len(topics[name]) for group in groups for name in group)
    parts: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    used = dict.fromkeys(parts, 0)
    for group in (groups[i] for i in order):
        size = sum(len(topics[name]) for name in group)
        part = next((part for part in ("validation", "test") if used[part] + size <= budget), "train")
        parts[part] += group
        used[part] += size
    return DatasetDict(
        {
            part: Dataset.from_dict({"topic": parts[part], "text": [topics[name] for name in parts[part]]})
            for part in ("train", "validation", "test")
        }
    )


def topic_groups(topics: dict[str, str]) -> list[list[str]]:
    """Names of the topics, without those that others contain, in groups that share no long paragraph."""
    paragraphs = {
        name: {p for part in text.split("\n\n") if len(p := part.strip()) >= SHARED}
        for name, text in sorted(topics.items())
    }
    groups: list[list[str]] = []
    for name, own in paragraphs.items():
        sharing = [group for group in groups if any(own & paragraphs[other] for other in group)]
        groups = [group for group in groups if group not in sharing] + [[*sum(sharing, []), name]]
    return [kept for group in groups if (kept := [name for name in group if not _contained(name, group, paragraphs)])]


def _contained(name: str, group: list[str], paragraphs: dict[str, set[str]]) -> bool:
    own = paragraphs[name]
    return any(
        own < paragraphs[other] or (own == paragraphs[other] and other < name) for other in group if other != name
    )
