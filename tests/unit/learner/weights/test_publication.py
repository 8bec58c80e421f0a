"""The chain of deltas that leads to the newest snapshot: bounded in length and bytes."""

from __future__ import annotations

import numpy as np
import pytest

from learner.weights.publication import Publication
from leeway.errors import InvalidDataError, NotFoundError
from leeway.types import PolicyVersion, WeightManifest, WeightRequest, WeightSnapshot
from leeway.weights.deltas import apply_deltas
from leeway.weights.digests import tensor_entry, weights_digest


def snapshot(step: int, changed: int = 40, size: int = 20_000) -> WeightSnapshot:
    words = np.random.default_rng(0).integers(0, 1 << 16, size, np.uint16)
    words[np.random.default_rng(1 + step).integers(0, size, changed)] += np.uint16(1 + step)
    data = words.astype("<u2").tobytes()
    manifest = WeightManifest((tensor_entry("w", "bfloat16", (size,), data),))
    return WeightSnapshot(PolicyVersion("run", 1, step, weights_digest(manifest)), 1, manifest, [data])


def published(*snapshots: WeightSnapshot, max_chain: int = 8) -> Publication:
    publication = Publication(snapshots[0])
    for following in snapshots[1:]:
        publication = publication.followed_by(following, max_chain)
    return publication


def test_a_chain_leads_from_each_of_its_versions_to_the_newest() -> None:
    versions = [snapshot(step) for step in range(5)]
    publication = published(*versions)
    for start in versions[:-1]:
        payloads = publication.parts(WeightRequest(versions[-1].version, start.version.digest))
        manifest, digest = versions[-1].manifest, versions[-1].version.digest
        assert list(map(bytes, apply_deltas(start, payloads, manifest, digest))) == list(versions[-1].buffers)


@pytest.mark.parametrize("max_chain", [0, 1, 3, 8])
def test_a_chain_has_a_longest_length(max_chain: int) -> None:
    versions = [snapshot(step) for step in range(6)]
    deltas = published(*versions, max_chain=max_chain).deltas
    assert len(deltas) == min(max_chain, 5)
    for base, target, delta in zip(versions[-len(deltas) - 1 :], versions[-len(deltas) :], deltas, strict=False):
        assert (delta.base_digest, delta.target_digest) == (base.version.digest, target.version.digest)


def test_a_chain_is_smaller_than_its_snapshot() -> None:
    versions = [snapshot(step, changed=9000) for step in range(12)]
    publication = published(*versions)
    size_bytes = versions[0].manifest.size_bytes
    least = min(delta.size_bytes for delta in publication.deltas)
    assert 1 < len(publication.deltas) < 8
    assert size_bytes - least < sum(delta.size_bytes for delta in publication.deltas) + least
    assert sum(delta.size_bytes for delta in publication.deltas) < size_bytes


def test_a_chain_begins_anew_where_a_delta_would_not_be_smaller() -> None:
    other = snapshot(3, size=10_000)  # another shape
    assert published(snapshot(0), snapshot(1), other).deltas == ()
    following = published(snapshot(0), snapshot(1), other, snapshot(4, size=10_000))
    assert [delta.base_digest for delta in following.deltas] == [other.version.digest]


def test_weights_that_come_back_are_left_by_their_newest_link() -> None:
    one, other, third = snapshot(0), snapshot(1), snapshot(2)
    publication = published(one, other, one, third)
    assert len(publication.parts(WeightRequest(third.version, one.version.digest))) == 1


def test_what_is_not_there_is_refused() -> None:
    versions = [snapshot(step) for step in range(3)]
    publication = published(*versions, max_chain=1)
    newest = versions[2].version
    with pytest.raises(NotFoundError, match="no longer the newest"):
        publication.parts(WeightRequest(versions[1].version))
    with pytest.raises(NotFoundError, match="no deltas lead to"):
        publication.parts(WeightRequest(newest, versions[0].version.digest))
    for first, end in [(0, 2), (1, 2), (2, 1), (9, 0)]:
        with pytest.raises(InvalidDataError, match="has no parts"):
            publication.parts(WeightRequest(newest, b"", first, end))
    assert publication.parts(WeightRequest(newest, b"", 0, 1)) == list(versions[2].buffers)
