"""Token algorithms: settings, filters, the decoding loop and what is built on it."""
