"""A trajectory from its wire chunks: checked while it grows, assembled when it is whole."""
