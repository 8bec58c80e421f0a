"""Every part is compared with its digest, however many come at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from inference_server.weights.fetcher import WeightFetcher
from inference_server.weights.transports import BATCH_BYTES, Announcement, Part
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import PolicyVersion, WeightManifest, WeightRequest
from leeway.v1 import policy_pb2
from leeway.weights.digests import tensor_entry, weights_digest

SIZES = (BATCH_BYTES + 1, 7, BATCH_BYTES, 0, 5)
PARTS = [bytes([1 + index]) * size for index, size in enumerate(SIZES)]
MANIFEST = WeightManifest(tuple(tensor_entry(f"t{i}", "uint8", (len(part),), part) for i, part in enumerate(PARTS)))
ANNOUNCEMENT = Announcement(1, PolicyVersion("run", 1, 1, weights_digest(MANIFEST)), MANIFEST)


class AtOnce:
    """A transport that brings all parts in one batch."""

    name = "zmq"

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def greet(self, hello: policy_pb2.PolicyWatcher) -> None:
        pass

    def reaches(self, announcement: Announcement) -> bool:
        return True

    async def fetch(
        self, announcement: Announcement, request: WeightRequest, sizes: Sequence[int]
    ) -> AsyncGenerator[list[Part]]:
        yield self._parts

    def gave_trouble(self, announcement: Announcement) -> None:
        pass

    def close(self) -> None:
        pass


def fetcher(parts: list[Part]) -> WeightFetcher:
    metrics = InferenceServerMetrics(CollectorRegistry())
    return WeightFetcher([AtOnce(parts)], take_deltas=False, metrics=metrics)


async def test_what_is_as_announced_is_taken() -> None:
    snapshot = await fetcher(list(PARTS)).fetch(ANNOUNCEMENT)
    assert list(map(bytes, snapshot.buffers)) == PARTS


@pytest.mark.parametrize("index", [0, 1, 2, 4])
async def test_a_wrong_byte_anywhere_is_found(index: int) -> None:
    wrong = bytearray(PARTS[index])
    wrong[-1] ^= 1
    with pytest.raises(CorruptDataError, match=f"tensor t{index} differ"):
        await fetcher([*PARTS[:index], bytes(wrong), *PARTS[index + 1 :]]).fetch(ANNOUNCEMENT)


async def test_too_few_parts_are_found() -> None:
    with pytest.raises(InvalidDataError, match="4 parts came where 5"):
        await fetcher(list(PARTS[:-1])).fetch(ANNOUNCEMENT)
