"""What a row means: a prompt, its responses, and which of them is preferred to which.

In: what a format found in a row. Out: `Record`s with their text, and their `PairMetadata` without it, which is held for
all rows.
Cost: a `PairMetadata` takes about 0.2 KB, however long the text is.
"""

from __future__ import annotations

import functools
import marshal
import pickle
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from rmtool.data.messages import Message, Messages
from rmtool.errors import Place

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RowOptions:
    """How a source is read.

    columns:        our field names and, for each, the source's: {"chosen": "better", "rejected": "worse"}; dots lead
                    into objects
    rating_margins: whether a pair's margin is the difference of its responses' ratings
    """

    columns: tuple[tuple[str, str], ...] = ()
    rating_margins: bool = False


PLAIN = RowOptions()


@dataclass(frozen=True, slots=True)
class PairMetadata:
    """What a record says of its responses, as `Record` has it; `prompt_hash` is a hash of the prompt's text, 0 without
    a prompt.
    """

    place: Place
    prompt_hash: int
    preferences: Pairs
    margins: tuple[float | None, ...]
    subset: str | None
    weight: float


@functools.lru_cache(1024)
def _shared(value: Any) -> Any:
    """The same object for equal values: most records have the same preferences."""
    return value


@dataclass(frozen=True)
class Record:
    """A prompt, its responses, and preferences (winner, loser) between them by index; none when only to be scored, or
    where all are tied.

    margins: one number per preference, or None where the row gave none
    weight:  what each of its preferences counts in the loss
    tools:   JSON of what the chat template is told of tools; empty without any
    row:     as it was written
    places:  of each response, where they stand in rows of their own
    """

    place: Place
    prompt: Messages
    responses: tuple[Messages, ...]
    preferences: Pairs = ()
    margins: tuple[float | None, ...] = ()
    subset: str | None = None
    weight: float = 1.0
    tools: str = ""
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    places: tuple[Place, ...] = ()

    def place_of(self, response: int) -> Place:
        """Where a response stands."""
        return self.places[response] if self.places else self.place

    def metadata(self) -> PairMetadata:
        text = marshal.dumps(tuple(map(tuple, self.prompt)), 2)
        key = int.from_bytes(blake2b(text, digest_size=8).digest()) if self.prompt else 0
        shared = _shared(self.preferences), _shared(self.margins), _shared(self.subset)
        return PairMetadata(self.place, key, *shared, self.weight)

    def content(self) -> bytes:
        """All that its token ids depend on, and which of its responses are compared: the same bytes for the same."""
        prompt, *responses = [tuple(map(tuple, messages)) for messages in (self.prompt, *self.responses)]
        return marshal.dumps((prompt, responses, self.tools, self.preferences), 2)  # later versions depend on identity

    def pack(self) -> bytes:
        """The record as bytes for `unpack`, in this process."""
        place = self.place.file, self.place.line, self.place.column
        places = [(place.file, place.line, place.column) for place in self.places]
        rest = self.margins, self.subset, self.weight, self.row, places
        return pickle.dumps((self.content(), place, *rest), protocol=5)

    @classmethod
    def unpack(cls, packed: bytes) -> Record:
        content, place, margins, subset, weight, row, places = pickle.loads(packed)
        prompt, responses, tools, preferences = marshal.loads(content)
        return cls(
            Place(*place),
            tuple(map(Message._make, prompt)),
            tuple(tuple(map(Message._make, messages)) for messages in responses),
            *(preferences, margins, subset, weight, tools, row),
            tuple(Place(*place) for place in places),
        )
