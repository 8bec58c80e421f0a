"""Weights that are trained a little in each step; what a learner keeps of them for its next incarnation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from leeway.service.durable import replace_file
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights.digests import tensor_entry, weights_digest

RUN = "push"
SIZES = (9000, 0, 700, 140_000)  # elements of two bytes
PIECE_BYTES = 100_000  # of a broadcast
_CHECKPOINT = "checkpoint.json"


class History:
    """What one incarnation of a learner trains; every step is drawn from its own seed.

    Args:
        seed: of the whole rehearsal.
        epoch: of this incarnation.
        start: how many there were before; no two train the same, whatever their epochs.
    """

    def __init__(self, seed: int, epoch: int, start: int = 0) -> None:
        self._seed = seed, start
        self._words = [np.random.default_rng(seed).integers(0, 1 << 16, size, np.uint16) for size in SIZES]
        self.epoch = epoch
        self.step = 0
        self._version_epoch = 0  # the epoch in which the present weights were made

    def snapshot(self) -> WeightSnapshot:
        """The present weights as this incarnation publishes them."""
        buffers = [words.astype("<u2").tobytes() for words in self._words]
        manifest = WeightManifest(
            tuple(
                tensor_entry(f"t{index}", "bfloat16", (len(words),), data)
                for index, (words, data) in enumerate(zip(self._words, buffers, strict=True))
            )
        )
        version = PolicyVersion(RUN, self._version_epoch, self.step, weights_digest(manifest))
        return WeightSnapshot(version, self.epoch, manifest, buffers)

    def train(self) -> None:
        """Change a few percent by a unit in the last place; one time in twenty everything, or nothing."""
        self.step += 1
        self._version_epoch = self.epoch
        generator = np.random.default_rng([*self._seed, self.step])
        luck = generator.random()
        share = 1.0 if luck < 0.05 else 0.0 if luck < 0.1 else 0.03
        self._words = [words.copy() for words in self._words]
        for words in self._words:
            moved = generator.random(len(words)) < share
            spread = 1 << 16 if share == 1.0 else 3
            words[moved] += generator.integers(0, spread, np.count_nonzero(moved), np.uint16)

    def save(self, directory: Path) -> None:
        """Make the present step the one that the next incarnation starts from."""
        weights = [words.astype("<u2").tobytes().hex() for words in self._words]
        content = {"step": self.step, "epoch": self._version_epoch, "weights": weights}
        replace_file(directory / _CHECKPOINT, json.dumps(content))

    def restore(self, directory: Path) -> None:
        """Be at the newest checkpoint, if there is one."""
        file = directory / _CHECKPOINT
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            self.step, self._version_epoch = content["step"], content["epoch"]
            self._words = [np.frombuffer(bytes.fromhex(words), "<u2") for words in content["weights"]]
