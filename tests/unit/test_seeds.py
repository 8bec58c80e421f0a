from __future__ import annotations

import hashlib

import numpy as np

from leeway.service.seeds import GAMMA, MASK_64, mix64, seed_of


def test_splitmix64_of_numbers_and_arrays_gives_the_published_sequence() -> None:
    # The first outputs of the reference implementation for the state 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = [(turn * GAMMA) & MASK_64 for turn in (1, 2, 3)]
    assert [mix64(state) for state in states] == expected
    mixed = mix64(np.array(states, np.uint64))
    assert mixed.dtype == np.uint64
    assert mixed.tolist() == expected


def test_a_seed_is_63_bits_of_the_digest() -> None:
    assert seed_of(b"1/0/2/3") == int.from_bytes(hashlib.sha256(b"1/0/2/3").digest()[:8], "little") >> 1
