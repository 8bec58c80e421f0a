"""Weight bytes to servers anywhere, as a gRPC stream: the bytes of PolicyService.FetchWeights."""

from __future__ import annotations

from collections.abc import Iterator

from learner.weights.publication import Publication, kind_of
from leeway.errors import NotFoundError
from leeway.rpc import BULK_PIECE_BYTES
from leeway.service.metrics import LearnerMetrics
from leeway.types import WeightRequest


class StreamedWeights:
    """Implements `learner.weights.outlet.WeightOutlet`."""

    def __init__(self, metrics: LearnerMetrics) -> None:
        self._metrics = metrics
        self._publication: Publication | None = None

    def offer(self, publication: Publication) -> None:
        self._publication = publication

    def pieces(self, request: WeightRequest) -> Iterator[bytes]:
        """The parts' bytes, in pieces that fit into messages.

        Raises:
            NotFoundError, InvalidDataError: as Publication.parts.
        """
        if self._publication is None:
            raise NotFoundError("nothing is published yet; wait for the first announcement")
        sent = self._metrics.published_bytes.labels("grpc", kind_of(request))
        for part in self._publication.parts(request):
            view = memoryview(part)
            for start in range(0, len(view), BULK_PIECE_BYTES):
                piece = bytes(view[start : start + BULK_PIECE_BYTES])
                sent.inc(len(piece))
                yield piece
