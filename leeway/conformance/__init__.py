"""The conformance kit: tests whether a server keeps the inference contract. See docs/conformance.md.

    command ──> kit.run ──> one Requirement after the other ──> Session ──> client ──> the server under test
                   │
                   └──> Results ──> table, JUnit

Requirements lie by family: `streams` (INFO, STREAM, RECORD), `sampling` (SEED, LOGPROB), `updates` (VERSION, UPDATE),
`refusals` (ERROR), `scheduling` (PAUSE, LIMIT, STOP). `statistics` is pure, `client` alone sees protobuf. Needs no
torch.
"""
