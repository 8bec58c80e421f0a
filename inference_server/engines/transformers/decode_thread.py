"""The decode loop: one thread that owns the model, and how the event loop talks to it.

    event loop                                   decode thread
    submit, cancel, swap, pause, resume, stop    loop:  wait until there is something to do
        │ under one condition, notify             │       swap staged weights, if any, and their version with them
        └────────────────────────────────────>    │       drop cancelled sequences
                                                  │       admit queued sequences to free rows    (prefill, first token)
    emit of each sequence  <──────────────────    │       step all rows                          (one token each)
        one call_soon_threadsafe per iteration    └──     deliver the iteration's chunks and ends

The thread waits on the condition when it is idle or paused; every command notifies it. Weights change only at
the top of the loop, so no forward runs on a mixture. Running sequences keep the keys and values that older weights
computed: their next token is sampled from what the new weights make of that past, and that is the behavior policy
whose log-prob is recorded. Whatever stops the loop is given to every open sequence and every waiting command.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from inference_server.engine import GenerationEnd
from inference_server.engines.transformers.decode_batch import DecodeBatch
from inference_server.engines.transformers.decode_sequence import DecodeSequence
from leeway.errors import ExhaustedError, FencedError, LeewayError, UnavailableError
from leeway.types import PolicyVersion, TrajectoryChunk

_Event = tuple[DecodeSequence, TrajectoryChunk | GenerationEnd | Exception]


@dataclass(frozen=True, slots=True)
class StagedUpdate:
    """Weights that fit the model, ready to be copied in."""

    version: PolicyVersion
    publisher_epoch: int
    copy_in: Callable[[], None]
    done: Future[float] = field(default_factory=Future[float])  # seconds decoding stood still


class DecodeThread:
    """Runs a DecodeBatch. Commands may come from any thread; events go to `event_loop`.

    Args:
        batch: the sequences; used by this thread only.
        chunk_tokens: sampled tokens of a sequence per chunk.
        max_queued: sequences that may wait for a row.
        num_threads: torch threads of the loop.
    """

    def __init__(self, batch: DecodeBatch, chunk_tokens: int, max_queued: int, num_threads: int) -> None:
        self._batch = batch
        self._chunk_tokens = chunk_tokens
        self._max_queued = max_queued
        self._num_threads = num_threads
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._queued: deque[DecodeSequence] = deque()
        self._cancelled: set[DecodeSequence] = set()
        self._updates: deque[StagedUpdate] = deque()
        self._pausing: list[Future[None]] = []
        self._paused = False
        self._stopping = False
        self._failure: LeewayError | None = None
        self._version: PolicyVersion | None = None
        self._highest_epoch = 0
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def version(self) -> PolicyVersion | None:
        """The version that the next token is sampled from."""
        with self._condition:
            return self._version

    def submit(self, sequence: DecodeSequence, event_loop: asyncio.AbstractEventLoop) -> None:
        """Queue a sequence.

        Raises:
            UnavailableError: the loop has stopped or failed, or no version was ever loaded.
            ExhaustedError: the queue is full.
        """
        with self._condition:
            self._raise_if_stopped()
            if self._version is None:
                raise UnavailableError("no policy version is loaded yet; wait for the first weight update")
            if len(self._queued) >= self._max_queued + self._batch.num_free:
                raise ExhaustedError(f"{len(self._queued)} requests wait for a slot already; retry later")
            self._event_loop = event_loop
            self._queued.append(sequence)
            self._condition.notify()

    def cancel(self, sequence: DecodeSequence) -> None:
        """Free what a sequence holds; nothing more is emitted for it after the current step."""
        with self._condition:
            if not sequence.ended:
                self._cancelled.add(sequence)
                self._condition.notify()

    def check_epoch(self, publisher_epoch: int) -> None:
        """Note a publisher's epoch.

        Raises:
            FencedError: a higher one has been seen.
        """
        with self._condition:
            self._refuse_lower(publisher_epoch)
            self._highest_epoch = publisher_epoch

    def swap(self, update: StagedUpdate) -> None:
        """Queue an update; its future ends once the version is served."""
        with self._condition:
            self._raise_if_stopped()
            self._updates.append(update)
            self._condition.notify()

    def pause(self) -> Future[None]:
        """Stop after the current step; the future ends when decoding stands still."""
        standing: Future[None] = Future()
        with self._condition:
            self._raise_if_stopped()
            self._paused = True
            self._pausing.append(standing)
            self._condition.notify()
        return standing

    def resume(self) -> None:
        """Continue decoding."""
        with self._condition:
            self._paused = False
            self._condition.notify()

    def stop(self, wait_seconds: float) -> bool:
        """Stop after the current step; whether the thread has ended within the wait."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        ending: LeewayError = UnavailableError("the engine stops; send the request to another server")
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._swap_weights()
                    self._drop_cancelled()
                    if not self._paused:
                        self._deliver(self._decode())
        except Exception as error:  # noqa: BLE001 - thread boundary: every open sequence learns what stopped it
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            ending = UnavailableError(f"the transformers engine failed at {self._version}: {cause}; restart the server")
        self._end(ending)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the loop is to stop."""
        with self._condition:
            while not self._stopping:
                if self._paused:
                    self._acknowledge_pause()
                if self._updates or self._cancelled:
                    return True
                if not self._paused and (self._queued or self._batch.num_rows):
                    return True
                self._condition.wait()
            return False

    def _swap_weights(self) -> None:
        """Copy staged weights in, in order of arrival. Between two decode steps, on the only thread that samples."""
        while (update := self._next_update()) is not None:
            started = time.perf_counter()
            try:
                update.copy_in()
            except Exception as error:
                update.done.set_exception(UnavailableError(f"the swap to {update.version} failed: {error}"))
                raise
            with self._condition:
                self._version = update.version
            update.done.set_result(time.perf_counter() - started)

    def _next_update(self) -> StagedUpdate | None:
        """The oldest staged update whose publisher has not been fenced since."""
        with self._condition:
            while self._updates:
                update = self._updates.popleft()
                try:
                    self._refuse_lower(update.publisher_epoch)
                except FencedError as error:
                    update.done.set_exception(error)
                else:
                    return update
            return None

    def _drop_cancelled(self) -> None:
        with self._condition:
            cancelled, self._cancelled = self._cancelled, set()
            if not cancelled:
                return
            self._queued = deque(sequence for sequence in self._queued if sequence not in cancelled)
        self._batch.remove_if(lambda sequence: sequence in cancelled)

    def _decode(self) -> list[_Event]:
        """Admit and step; returns the events of this iteration."""
        with self._condition:
            version = self._version
            admitted = [self._queued.popleft() for _ in range(min(len(self._queued), self._batch.num_free))]
        if version is None:
            return []
        events: list[_Event] = []
        if admitted:
            self._batch.admit(admitted, version)
            events.extend(self._take_finished())
        if self._batch.num_rows:
            self._batch.step(version)
            events.extend(self._take_finished())
        for sequence in self._batch.running():
            if sequence.num_unstreamed >= self._chunk_tokens:
                events.append((sequence, sequence.take_chunk()))
        return events

    def _take_finished(self) -> list[_Event]:
        events: list[_Event] = []
        for sequence, reason in self._batch.finished():
            sequence.ended = True
            events.append((sequence, sequence.take_chunk()))
            events.append((sequence, sequence.end(reason)))
        return events

    def _deliver(self, events: list[_Event]) -> None:
        if not events or self._event_loop is None:
            return
        # A closed event loop raises: the events have no reader any more.
        with contextlib.suppress(RuntimeError):
            self._event_loop.call_soon_threadsafe(_emit, events)

    def _end(self, ending: LeewayError) -> None:
        """Refuse later commands, and end every open sequence and command with the reason."""
        with self._condition:
            self._failure = ending
            open_sequences = [*self._batch.running(), *self._queued]
            waiting: list[Future[float] | Future[None]] = [update.done for update in self._updates]
            waiting += self._pausing
            self._queued.clear()
            self._updates.clear()
            self._pausing.clear()
        self._deliver([(sequence, ending) for sequence in open_sequences])
        for future in waiting:
            if not future.done():
                future.set_exception(ending)

    def _acknowledge_pause(self) -> None:
        for standing in self._pausing:
            if not standing.done():
                standing.set_result(None)
        self._pausing.clear()

    def _refuse_lower(self, publisher_epoch: int) -> None:
        if publisher_epoch < self._highest_epoch:
            raise FencedError(
                f"weights of publisher epoch {publisher_epoch} are refused: epoch {self._highest_epoch} took over"
            )

    def _raise_if_stopped(self) -> None:
        if self._failure is not None or self._stopping:
            raise UnavailableError(str(self._failure or "the engine stops; send the request to another server"))


def _emit(events: list[_Event]) -> None:
    """Hand an iteration's events to their sequences, in the event loop's thread."""
    for sequence, item in events:
        sequence.emit(item)
