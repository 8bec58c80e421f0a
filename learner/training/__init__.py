"""One optimizer step: from the groups of a batch to new weights."""
