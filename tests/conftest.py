"""For every test."""

# Pytest imports this when it prints its summary, and rewrites it for assertions. In CPython before 3.11.8 a parser that
# was interrupted once refuses every later source (python/cpython#106905), so it comes before anything can interrupt.
import hypothesis.internal.observability  # noqa: F401  # pyright: ignore[reportUnusedImport]
