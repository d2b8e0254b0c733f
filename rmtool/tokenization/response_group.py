"""A prompt and its responses as token ids, each token stored once.

In: one id sequence per response, every one starting with the same prompt. Out: a `ResponseGroup`, the longest common
prefix and what follows it in each response. The prefix is taken on ids, never on text: a tokenizer may merge the last
prompt characters with the first response characters, and then the two texts share more than their ids do.
Cost: linear in the tokens of the shortest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ResponseGroup:
    """`prompt` int32[P] and `responses` int32[R_i] each, R_i >= 1: each response owns the token its reward is read at.

    A group with one response has an empty prompt: there is nothing to share.
    """

    prompt: Ids
    responses: tuple[Ids, ...]

    @property
    def unique_tokens(self) -> int:
        """Tokens to compute when the prompt is computed once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and response."""
        return len(self.prompt) + max(len(response) for response in self.responses)

    def sequences(self) -> list[Ids]:
        """Each response with its prompt before it, as a model without sharing reads it."""
        return [self.sequence(index) for index in range(len(self.responses))]

    def sequence(self, index: int) -> Ids:
        """One response with its prompt before it."""
        response = self.responses[index]
        return np.concatenate((self.prompt, response)) if len(self.prompt) else response

    def window(self, index: int, start: int, stop: int) -> Ids:
        """Ids [start, stop) of `sequence(index)`, fewer where it ends sooner."""
        prompt, response, cut = self.prompt, self.responses[index], len(self.prompt)
        if stop <= cut:
            return prompt[start:stop]
        if start >= cut:
            return response[start - cut : stop - cut]
        return np.concatenate((prompt[start:], response[: stop - cut]))

    def truncate_prompt(self, count: int) -> ResponseGroup:
        """The group without the first `count` tokens of its prompt."""
        assert 0 <= count <= len(self.prompt)
        return ResponseGroup(self.prompt[count:], self.responses)

    def keep(self, responses: Sequence[int]) -> ResponseGroup:
        """The group with only these responses, in this order."""
        return ResponseGroup(self.prompt, tuple(self.responses[index] for index in responses))


def build_group(sequences: Sequence[Sequence[int] | Ids]) -> ResponseGroup:
    """Share the longest common prefix of `sequences`; every sequence keeps at least its last token for itself."""
    arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    assert arrays
    assert all(len(array) for array in arrays)
    if len(arrays) == 1:
        return ResponseGroup(arrays[0][:0], tuple(arrays))
    prefix = common_prefix(arrays)
    return ResponseGroup(arrays[0][:prefix], tuple(array[prefix:] for array in arrays))


def common_prefix(arrays: Sequence[Ids]) -> int:
    """Length of the longest common prefix, at most one less than the shortest array."""
    limit = min(len(array) for array in arrays) - 1
    for array in arrays[1:]:
        differs = np.flatnonzero(arrays[0][:limit] != array[:limit])
        if len(differs):
            limit = int(differs[0])
    return limit
