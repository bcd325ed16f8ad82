"""Sources of records, preprocessing, batches, text and sequence packing."""
