"""The conformance kit: does a server keep the inference contract? See docs/conformance.md.

    command ──> kit.run ──> one Requirement after the other ──> Session ──> client ──> the server under test
                   │
                   └──> Results ──> table, JUnit

One module per family of requirements; `statistics` is pure, `client` alone sees protobuf. Needs no torch.
"""
